package generations

import (
	"context"
	"io"
)

// Target makes the store a target of pushes by pusher, the name under which
// generations remember who made them.
func (s *Store) Target(pusher string) Target { return localTarget{s, pusher} }

type localTarget struct {
	store  *Store
	pusher string
}

// Offer implements Target.
func (l localTarget) Offer(ctx context.Context, repository string, h Header, open func() (io.ReadCloser, error)) (Answer, Push, error) {
	answer, t, err := l.store.Begin(ctx, Request{Repository: repository, Header: h, Pusher: l.pusher})
	if err != nil || t == nil {
		return answer, nil, err
	}
	if answer.Answer == SendManifest {
		answer, err = l.manifest(ctx, t, open)
		if err != nil {
			t.Close()
			return Answer{}, nil, err
		}
	}
	return answer, t, nil
}

func (l localTarget) manifest(ctx context.Context, t *Transaction, open func() (io.ReadCloser, error)) (Answer, error) {
	r, err := open()
	if err != nil {
		return Answer{}, err
	}
	defer r.Close()
	return t.TakeManifest(ctx, r)
}

var _ Push = (*Transaction)(nil)
