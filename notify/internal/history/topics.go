package history

import (
	"database/sql"
	"errors"
	"strconv"
)

// topicRow is a topic as it is stored.
type topicRow struct {
	id   int64
	name string
	// first to head are the numbers of the stored messages; first is head + 1 if there are none.
	first, head int64
	lost        int64 // see schema
	fall        fall
	lastTime    int64 // time of the message head, in Unix milliseconds
	leftIDs     bool  // ids of deleted messages remain
}

const selectTopics = `SELECT id, name,
	(SELECT min(seq) FROM messages WHERE topic = topics.id),
	max(head, ifnull((SELECT max(seq) FROM messages WHERE topic = topics.id), 0)),
	lost, fell, dipped, peak,
	ifnull((SELECT time FROM messages WHERE topic = topics.id ORDER BY seq DESC LIMIT 1), 0),
	EXISTS (SELECT 1 FROM ids WHERE topic = topics.id
		AND seq < ifnull((SELECT min(seq) FROM messages WHERE topic = topics.id), seq + 1))
	FROM topics `

func (t *topicRow) scan(row interface{ Scan(...any) error }) error {
	var first sql.NullInt64
	if err := row.Scan(&t.id, &t.name, &first, &t.head, &t.lost, &t.fall.fell, &t.fall.dipped, &t.fall.peak, &t.lastTime, &t.leftIDs); err != nil {
		return err
	}
	if t.first = first.Int64; !first.Valid {
		t.first = t.head + 1
	}
	return nil
}

// topic returns the topic with name. Its id is 0 if it has never had a message.
func (s *store) topic(name string) (topicRow, error) {
	t := topicRow{}
	err := t.scan(s.selectTopic.QueryRow(name))
	if errors.Is(err, sql.ErrNoRows) {
		return s.newTopic(name), nil
	}
	return t, err
}

// newTopic returns a topic that has no row. A client that has seen its number floor has missed
// nothing: either that was the last message, or there never was one.
func (s *store) newTopic(name string) topicRow {
	floor := s.floor.Load()
	return topicRow{name: name, first: floor + 1, head: floor, lost: floor - 1}
}

// topicsAfter returns up to limit topics whose ids are greater than id, ordered by id.
func (s *store) topicsAfter(id int64, limit int) ([]topicRow, error) {
	rows, err := s.read.Query(selectTopics+"WHERE id > ? ORDER BY id LIMIT ?", id, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var topics []topicRow
	for rows.Next() {
		var t topicRow
		if err := t.scan(rows); err != nil {
			return nil, err
		}
		topics = append(topics, t)
	}
	return topics, rows.Err()
}

// The rest must be called within a transaction.

// addTopic adds the row of a topic that has none, and sets its id.
func (s *store) addTopic(t *topicRow) error {
	result, err := s.insertTopic.Exec(t.name, t.head, t.lost)
	if err != nil {
		return err
	}
	t.id, err = result.LastInsertId()
	return err
}

// raiseFloor makes floor the last number of topics that have no row.
func (s *store) raiseFloor(floor int64) error {
	s.floor.Store(floor)
	return s.setMeta(metaFloor, strconv.FormatInt(floor, 10))
}

// removeTopics deletes the rows of topics without messages.
func (s *store) removeTopics(topics []topicRow) error {
	floor := s.floor.Load()
	for _, t := range topics {
		floor = max(floor, t.head)
		if t.lost >= t.head { // who has seen the last one has missed something all the same
			floor = max(floor, t.head+1)
		}
	}
	if err := s.raiseFloor(floor); err != nil { // before anybody can see that a row is gone
		return err
	}
	for _, t := range topics {
		if _, err := s.deleteTopic.Exec(t.id); err != nil {
			return err
		}
	}
	return nil
}

// trim deletes the messages of a topic up to the number upTo. It deletes their ids if they are
// older than idsBefore (Unix milliseconds), or newer than now because a clock was ahead.
func (s *store) trim(topicID, upTo, idsBefore, now int64) error {
	if _, err := s.saveHead.Exec(upTo, topicID); err != nil {
		return err
	}
	if _, err := s.deleteMessages.Exec(topicID, upTo); err != nil {
		return err
	}
	_, err := s.deleteIDs.Exec(topicID, upTo, idsBefore, now)
	return err
}

// lose records that messages after the number head may not have been stored.
func (s *store) lose(topicID, head int64) error {
	_, err := s.markLost.Exec(head, topicID)
	return err
}
