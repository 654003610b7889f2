package history

import (
	"errors"
	"fmt"
	"log/slog"
	"time"
)

// failed is told of an error of the store. It returns the one for the sender.
func (h *Log) failed(s *store, err error) error {
	h.failures.Add(1)
	clear(h.topics) // what was counted in memory did not happen
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

// log tells of a failure, not more than once in a while.
func (h *Log) log(err error) {
	if now := time.Now(); now.Sub(h.complain) > 10*time.Second {
		h.complain = now
		h.config.Logger().Error("The history of topics cannot be written", slog.String("path", h.config.Path), slog.String("error", err.Error()))
	}
}

// open returns the store. Only who leads may call it.
func (h *Log) open() (*store, error) {
	if s := h.store.Load(); s != nil {
		return s, nil
	}
	if time.Since(h.tried) > reopenEvery {
		h.tried = time.Now()
		s, err := openStore(h.config.Path, h.config.Identify)
		if isDamaged(err) && h.setAside(err) == nil {
			s, err = openStore(h.config.Path, h.config.Identify)
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
