package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"farkeep/appliance/benchtest"
)

// BenchmarkSFTP uploads with OpenSSH's sftp, to OpenSSH's own server and into a
// staging copy.
func BenchmarkSFTP(b *testing.B) {
	for _, data := range []struct {
		name string
		make func(b testing.TB, dir string) int64
	}{
		{"segments", makeSegments},
		{"small", makeSmall},
	} {
		b.Run(data.name, func(b *testing.B) {
			s := startStock(b, "3g")
			source, target := filepath.Join(s.dir, "source"), filepath.Join(s.dir, "target")
			mountTmpfs(b, source, "3g")
			mountExt4(b, target, 3<<10)
			size := data.make(b, source)
			want := sums(b, source)
			sshd := startSSHD(b, s.dir)
			put := func(config, host, to string, pids ...int) benchtest.Cost {
				cmd := exec.Command("sftp", "-F", config, "-b", "-", host)
				cmd.Stdin = strings.NewReader(fmt.Sprintf("put -r %s %s\n", source, to))
				c, _ := measure(b, cmd, pids...)
				return c
			}
			s.sftp(b, "pi", "mkdir /bench\n").must(b, "mkdir")
			compare(b, size, []contender{
				{"openssh", func(int) benchtest.Cost {
					to := filepath.Join(target, "copy")
					c := put(sshd.config, "bench", to, sshd.pid)
					sameFiles(b, want, to)
					must(b, os.RemoveAll(to))
					return c
				}},
				{"farkeep", func(int) benchtest.Cost {
					c := put(s.config, "pi", "/bench/copy", s.parts...)
					copied := filepath.Join(s.paths.Disk(), "staging", "bench", "home", "files", "copy")
					sameFiles(b, want, copied)
					must(b, os.RemoveAll(copied)) // only the room
					return c
				}},
			})
		})
	}
}
