// Package pb_public is Herald's web page, embedded into the executable.
package pb_public

import "embed"

// FS holds the files of the page. lib holds the JavaScript SDK where the build
// found it (see lib/README.md).
//
//go:embed index.html style.css app lib
var FS embed.FS
