package mount

import (
	"context"
	"syscall"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// What a read-only mount refuses before it comes here, and Mount.Deny does not.

var (
	_ fusefs.NodeCreater   = (*inode)(nil)
	_ fusefs.NodeLinker    = (*inode)(nil)
	_ fusefs.NodeMkdirer   = (*inode)(nil)
	_ fusefs.NodeMknoder   = (*inode)(nil)
	_ fusefs.NodeRenamer   = (*inode)(nil)
	_ fusefs.NodeRmdirer   = (*inode)(nil)
	_ fusefs.NodeSetattrer = (*inode)(nil)
	_ fusefs.NodeSymlinker = (*inode)(nil)
	_ fusefs.NodeUnlinker  = (*inode)(nil)
)

// Create implements fusefs.NodeCreater: it refuses.
func (*inode) Create(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fusefs.Inode, fusefs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EACCES
}

// Link implements fusefs.NodeLinker: it refuses.
func (*inode) Link(context.Context, fusefs.InodeEmbedder, string, *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	return nil, syscall.EACCES
}

// Mkdir implements fusefs.NodeMkdirer: it refuses.
func (*inode) Mkdir(context.Context, string, uint32, *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	return nil, syscall.EACCES
}

// Mknod implements fusefs.NodeMknoder: it refuses.
func (*inode) Mknod(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	return nil, syscall.EACCES
}

// Rename implements fusefs.NodeRenamer: it refuses.
func (*inode) Rename(context.Context, string, fusefs.InodeEmbedder, string, uint32) syscall.Errno {
	return syscall.EACCES
}

// Rmdir implements fusefs.NodeRmdirer: it refuses.
func (*inode) Rmdir(context.Context, string) syscall.Errno { return syscall.EACCES }

// Setattr implements fusefs.NodeSetattrer: it refuses.
func (*inode) Setattr(context.Context, fusefs.FileHandle, *fuse.SetAttrIn, *fuse.AttrOut) syscall.Errno {
	return syscall.EACCES
}

// Symlink implements fusefs.NodeSymlinker: it refuses.
func (*inode) Symlink(context.Context, string, string, *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	return nil, syscall.EACCES
}

// Unlink implements fusefs.NodeUnlinker: it refuses.
func (*inode) Unlink(context.Context, string) syscall.Errno { return syscall.EACCES }
