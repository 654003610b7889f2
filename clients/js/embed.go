// Package js is Herald's client module for JavaScript, embedded into the executable: the files of the npm package that
// are also served to browsers.
package js

import "embed"

// FS holds the module and its types.
//
//go:embed herald.js herald.d.ts
var FS embed.FS
