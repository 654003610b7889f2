package conn

// room lets any number of goroutines wait until there is room. Whoever owns it guards it with a lock.
type room struct{ told chan struct{} } // nil if nobody waits

// await returns what is closed when there is room.
func (r *room) await() <-chan struct{} {
	if r.told == nil {
		r.told = make(chan struct{})
	}
	return r.told
}

// isAwaited reports whether somebody waits.
func (r *room) isAwaited() bool { return r.told != nil }

// tell lets those go on who wait.
func (r *room) tell() {
	if r.told != nil {
		close(r.told)
		r.told = nil
	}
}
