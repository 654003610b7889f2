//go:build !linux

package notify

// fileIdentity is not known here: only backups made by PocketBase are recognised
// as older copies.
func fileIdentity(string) string { return "" }
