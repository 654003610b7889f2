// Package records has what is asked of records, collections and transactions in more than
// one place.
package records

import (
	"fmt"
	"sync"

	"github.com/pocketbase/pocketbase/core"
)

// PerTx holds a value of the transaction that writes. There is one at a time; one that
// panicked never tells of its end, and its value goes when the next one comes.
type PerTx[T any] struct {
	mu    sync.Mutex // guards what follows
	tx    *core.TxAppInfo
	value T
}

// With calls use with the value of tx, which is a zero one at first. When tx is over the
// value is forgotten, and over is called with it.
func (p *PerTx[T]) With(tx *core.TxAppInfo, over func(value T, committed bool), use func(value *T)) {
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
func (p *PerTx[T]) forget(tx *core.TxAppInfo) (value T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tx == tx {
		var zero T
		value, p.tx, p.value = p.value, nil, zero
	}
	return value
}

// Missing tells why there is no collection of Herald's own with the id, or "" when
// there is; name is what the migration called it.
func Missing(app core.App, id, name string) string {
	if _, err := app.FindCachedCollectionByNameOrId(id); err == nil {
		return ""
	}
	if _, err := app.FindCachedCollectionByNameOrId(name); err == nil {
		return fmt.Sprintf("the application has a collection %q of its own", name)
	}
	return fmt.Sprintf("their collection %q was removed", name)
}

// Stored returns the record as the database has it before the change. Its Original
// is what it was when it was loaded: empty for one that the same code has created,
// and old for one that it has saved since.
func Stored(app core.App, record *core.Record) *core.Record {
	before, err := app.FindRecordById(record.Collection(), fmt.Sprint(record.LastSavedPK()))
	if err != nil {
		return record.Original()
	}
	return before
}
