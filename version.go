package main

import "runtime/debug"

// pocketbaseVersion returns the version of PocketBase that is compiled in.
func pocketbaseVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, module := range info.Deps {
		if module.Path == "github.com/pocketbase/pocketbase" {
			return module.Version
		}
	}
	return "unknown"
}
