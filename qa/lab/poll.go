package lab

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const pollEvery = 50 * time.Millisecond

// permanent is an error that waiting cannot mend.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// poll calls ask until it returns nil, a permanent error, or ctx ends; then the last error explains.
func poll(ctx context.Context, ask func() error) error {
	for {
		err := ask()
		var p permanent
		if err == nil || errors.As(err, &p) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-time.After(pollEvery):
		}
	}
}
