// Package records contains helpers for records, collections and transactions that several packages
// need.
package records

import (
	"fmt"
	"sync"

	"github.com/pocketbase/pocketbase/core"
)

// PerTx holds a value for the transaction that writes. There is one such transaction at a time. A
// transaction that panicked never reports its end; its value is dropped when the next transaction
// comes.
type PerTx[T any] struct {
	mu    sync.Mutex // guards the fields below
	tx    *core.TxAppInfo
	value T
}

// With calls use with the value of tx, which is zero at first. When tx is over, the value is
// dropped and over is called with it.
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

// forget removes and returns the value of tx.
func (p *PerTx[T]) forget(tx *core.TxAppInfo) (value T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.tx == tx {
		var zero T
		value, p.tx, p.value = p.value, nil, zero
	}
	return value
}

// Missing returns why Herald's own collection with the id does not exist, or "" if it does; name is
// its name in the migration.
func Missing(app core.App, id, name string) string {
	if _, err := app.FindCachedCollectionByNameOrId(id); err == nil {
		return ""
	}
	if _, err := app.FindCachedCollectionByNameOrId(name); err == nil {
		return fmt.Sprintf("the application has a collection %q of its own", name)
	}
	return fmt.Sprintf("their collection %q was removed", name)
}

// Stored returns the record as it is in the database before the change. The record's Original is
// what was loaded: it is empty if the same code has created the record, and outdated if that code
// has saved it since.
func Stored(app core.App, record *core.Record) *core.Record {
	before, err := app.FindRecordById(record.Collection(), fmt.Sprint(record.LastSavedPK()))
	if err != nil {
		return record.Original()
	}
	return before
}
