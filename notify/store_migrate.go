// What the first versions of the history have stored by name, brought into the form of this
// one when it is opened by store.go.

package notify

import (
	"context"
	"encoding/json/v2"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"herald/notify/internal/sets"
)

// migrate brings what an older version has stored into the form of this one.
func (s *store) migrate(ctx context.Context, identify func(sent time.Time, audience []byte, sender string) ([]byte, string)) (err error) {
	var version int
	if err := s.write.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil || version >= storedVersion {
		return err
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, tx.Rollback())
		}
	}()
	type row struct {
		topic int64
		stored
	}
	for _, column := range []string{"fell", "dipped", "peak"} {
		var has bool
		if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM pragma_table_info('topics') WHERE name = ?)", column).Scan(&has); err != nil {
			return err
		}
		if has {
			continue
		}
		if _, err := tx.ExecContext(ctx, "ALTER TABLE topics ADD COLUMN "+column+" INTEGER NOT NULL DEFAULT 0"); err != nil {
			return err
		}
	}
	for last := (row{topic: -1}); ; {
		rows, err := tx.QueryContext(ctx, "SELECT topic, seq, time, sender, audience FROM messages "+
			"WHERE (topic, seq) > (?, ?) AND (audience IS NOT NULL OR sender <> '') ORDER BY topic, seq LIMIT 1000", last.topic, last.seq)
		if err != nil {
			return err
		}
		var group []row
		for rows.Next() {
			var r row
			if err := rows.Scan(&r.topic, &r.seq, &r.time, &r.sender, &r.audience); err != nil {
				return errors.Join(err, rows.Close())
			}
			group = append(group, r)
		}
		if err := rows.Err(); err != nil {
			return err
		}
		if len(group) == 0 {
			break
		}
		for _, r := range group {
			audience, sender := identify(unixMilli(r.time), r.audience, r.sender)
			if _, err := tx.ExecContext(ctx, "UPDATE messages SET audience = ?, sender = ? WHERE topic = ? AND seq = ?", audience, sender, r.topic, r.seq); err != nil {
				return err
			}
		}
		last = group[len(group)-1]
	}
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", storedVersion)); err != nil {
		return err
	}
	return tx.Commit()
}

// byNames is an audience as the first versions stored it.
type byNames struct {
	To     Audience `json:"to"`
	Except Except   `json:"except"`
}

// identify returns what the first versions stored with a message that was sent at a time,
// its audience and its sender, as it is stored now. A name is taken for the collection
// that has it, unless that was made later.
func (n *Notifier) identify(sent time.Time, encoded []byte, sender string) ([]byte, string) {
	if sender != "" {
		name, id, _ := strings.Cut(sender, ":")
		if collection, err := n.app.FindCachedCollectionByNameOrId(name); err == nil && !collection.Created.Time().After(sent) {
			sender = userRef{collection.Id, id}.String()
		}
	}
	if encoded == nil {
		return nil, sender
	}
	unknown, _ := storedAudience{Version: storedVersion, Unknown: true}.encode()
	var version struct {
		Version int `json:"v"`
	}
	if json.Unmarshal(encoded, &version) == nil && version.Version > 0 {
		return encoded, sender // by an older version that was started in between
	}
	var names byNames
	if err := json.Unmarshal(encoded, &names); err != nil {
		return unknown, sender
	}
	a, errs := n.compile(names.To, names.Except)
	if len(errs) > 0 {
		return unknown, sender
	}
	isLater := func(id string) bool {
		collection, err := n.app.FindCachedCollectionByNameOrId(id)
		return err != nil || collection.Created.Time().After(sent)
	}
	named := slices.Collect(maps.Keys(a.collections))
	for _, refs := range []sets.Of[userRef]{a.users, a.exceptUsers} {
		for ref := range refs {
			named = append(named, ref.collectionID)
		}
	}
	if slices.ContainsFunc(named, isLater) {
		return unknown, sender
	}
	a.filter = slices.DeleteFunc(a.filter, func(filter collectionFilter) bool { return isLater(filter.collection.Id) })
	stored, err := a.stored()
	if err != nil {
		return unknown, sender
	}
	return stored, sender
}
