package history

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// failed handles an error of the store and returns the error for the sender.
func (h *Log) failed(s *store, err error) error {
	h.failures.Add(1)
	clear(h.topics) // the state in memory was not stored
	if errors.Is(err, errBroken) || isDamaged(err) {
		h.store.Store(nil)
		_ = s.close()
	}
	if isDamaged(err) {
		err = errors.Join(err, h.setAside(err))
	}
	h.log(err)
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// log logs a failure, at most once per 10 seconds.
func (h *Log) log(err error) {
	if now := time.Now(); now.Sub(h.complain) > 10*time.Second {
		h.complain = now
		h.config.Logger().Error("The history of topics cannot be written", slog.String("path", h.config.Path), slog.String("error", err.Error()))
	}
}

// open returns the store. Only the leader may call it.
func (h *Log) open() (*store, error) {
	if s := h.store.Load(); s != nil {
		return s, nil
	}
	if time.Since(h.tried) > reopenEvery {
		h.tried = time.Now()
		s, err := openStore(&h.config)
		if isDamaged(err) && h.setAside(err) == nil {
			s, err = openStore(&h.config)
		}
		if h.openError = err; err == nil {
			h.tried = time.Time{}
			clear(h.topics)
			h.store.Store(s)
			h.startSweeping()
			return s, nil
		}
		h.log(err)
	}
	return nil, fmt.Errorf("%w: %w", ErrUnavailable, h.openError)
}
