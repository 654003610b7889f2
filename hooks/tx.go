// What belongs to one transaction, until it is over: see channels.go and cascade.go.

package hooks

import (
	"sync"

	"github.com/pocketbase/pocketbase/core"
)

// perTx holds a value of the transaction that writes. There is one at a time; one that
// panicked never tells of its end, and its value goes when the next one comes.
type perTx[T any] struct {
	mu    sync.Mutex // guards what follows
	tx    *core.TxAppInfo
	value T
}

// with calls use with the value of tx, which is a zero one at first. When tx is over the
// value is forgotten, and over is called with it.
func (p *perTx[T]) with(tx *core.TxAppInfo, over func(value T, committed bool), use func(value *T)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tx != tx {
		var zero T
		p.tx, p.value = tx, zero
		tx.OnComplete(func(txErr error) error {
			over(p.forget(tx), txErr == nil)
			return nil
		})
	}
	use(&p.value)
}

// forget returns the value of tx, which has one no longer.
func (p *perTx[T]) forget(tx *core.TxAppInfo) (value T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tx == tx {
		var zero T
		value, p.tx, p.value = p.value, nil, zero
	}
	return value
}
