package main

import (
	"context"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// slowFolder puts a folder on a disk that takes a while to sync, as an SD card
// does: one flush at a time, and each serves all who asked before it began.
func slowFolder(t testing.TB, path string, flush time.Duration) {
	t.Helper()
	behind := path + ".behind"
	if err := os.Rename(path, behind); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	d := &slowDisk{asks: make(chan chan struct{})}
	ctx, stop := context.WithCancel(context.Background())
	go d.spin(ctx, flush)
	root, err := fs.NewLoopbackRoot(behind)
	if err != nil {
		t.Fatal(err)
	}
	top := &slowNode{LoopbackNode: root.(*fs.LoopbackNode), disk: d}
	server, err := fs.Mount(path, top, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "slow disk", Name: "slow"}})
	if err != nil {
		t.Fatalf("mount a slow disk (needs root and /dev/fuse): %v", err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
		stop()
	})
}

type slowDisk struct{ asks chan chan struct{} }

// spin is the disk: it flushes for those who asked while it was busy.
func (d *slowDisk) spin(ctx context.Context, flush time.Duration) {
	var waiting []chan struct{}
	var busy <-chan time.Time
	var served []chan struct{}
	for {
		if busy == nil && len(waiting) > 0 {
			served, waiting = waiting, nil
			busy = time.After(flush)
		}
		select {
		case ask := <-d.asks:
			waiting = append(waiting, ask)
		case <-busy:
			for _, ask := range served {
				close(ask)
			}
			busy = nil
		case <-ctx.Done():
			return
		}
	}
}

type slowNode struct {
	*fs.LoopbackNode
	disk *slowDisk
}

// WrapChild implements fs.NodeWrapChilder.
func (n *slowNode) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &slowNode{LoopbackNode: ops.(*fs.LoopbackNode), disk: n.disk}
}

// Fsync implements fs.NodeFsyncer, for files and folders.
func (n *slowNode) Fsync(ctx context.Context, _ fs.FileHandle, _ uint32) syscall.Errno {
	done := make(chan struct{})
	select {
	case n.disk.asks <- done:
	case <-ctx.Done():
		return syscall.EINTR
	}
	<-done
	return 0
}
