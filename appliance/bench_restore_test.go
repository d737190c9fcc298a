package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"farkeep/appliance/benchtest"
	"farkeep/shared/linetest"
)

// BenchmarkRestore brings a generation back: with the pusher, with OpenSSH's sftp
// out of the same receiver, with OpenSSH's sftp and with rsync out of OpenSSH's
// server. Once as quick as the machine is, and once over a line on which every
// byte takes 20 ms: what a file costs in round trips shows only there.
func BenchmarkRestore(b *testing.B) {
	for _, data := range []struct {
		name string
		make func(b testing.TB, dir string) int64
		late time.Duration
	}{
		{"segments", makeSegments, 0},
		{"small", makeSmall, 0},
		{"segments-20ms", makeSegments, 20 * time.Millisecond},
		{"small-20ms", makeSmall, 20 * time.Millisecond},
	} {
		b.Run(data.name, func(b *testing.B) {
			dir := benchDir(b)
			source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
			mountTmpfs(b, source, "3g")
			mountTmpfs(b, target, "3g")
			size := data.make(b, source)
			want := sums(b, source)
			a, sshd := benchmarkAppliance(b, dir), startSSHD(b, dir)
			site := a.site(b, filepath.Join(dir, "site"), "photos", source)
			site.push(b, "new")
			generation := site.generation(b, 1)

			// From here on every contender comes by a line of its own.
			ours := linetest.Start(b, a.address(), linetest.Line{Delay: data.late}).Addr()
			stock := sshd.through(b, linetest.Start(b, sshd.address, linetest.Line{Delay: data.late}).Addr()).config
			to := filepath.Join(target, "copy")
			fetch := func(in string, cmd *exec.Cmd, servers ...int) benchtest.Cost {
				c, _ := measure(b, cmd, servers...)
				sameFiles(b, want, filepath.Join(to, in))
				must(b, os.RemoveAll(to))
				return c
			}
			sftp := func(options []string, from, in string, servers ...int) benchtest.Cost {
				must(b, os.MkdirAll(to, 0o700))
				batch := filepath.Join(dir, "batch")
				must(b, os.WriteFile(batch, fmt.Appendf(nil, "get -R %s %s\n", from, to), 0o600))
				return fetch(in, exec.Command("sftp", append(options, "-q", "-b", batch, "bench")...), servers...)
			}
			own := filepath.Join(dir, "own_config")
			_, port, err := net.SplitHostPort(ours)
			must(b, err)
			known := filepath.Join(dir, "own_known_hosts")
			must(b, os.WriteFile(known, fmt.Appendf(nil, "[127.0.0.1]:%s %s\n", port, a.hostKey), 0o600))
			must(b, os.WriteFile(own, fmt.Appendf(nil, "Host bench\n  HostName 127.0.0.1\n  Port %s\n  User farkeep\n  IdentityFile %s\n  IdentitiesOnly yes\n  BatchMode yes\n  LogLevel ERROR\n  UserKnownHostsFile %s\n",
				port, a.restore, known), 0o600))
			compare(b, size, []contender{
				{"rsync", func(int) benchtest.Cost {
					must(b, os.MkdirAll(to, 0o700))
					return fetch("", exec.Command("rsync", "-a", "--rsh=ssh -F "+stock, "bench:"+source+"/", to+"/"), sshd.pid)
				}},
				{"sftp", func(int) benchtest.Cost { return sftp([]string{"-F", stock}, source, "source", sshd.pid) }},
				{"sftp-receiver", func(int) benchtest.Cost {
					return sftp([]string{"-F", own}, "/photos/"+filepath.Base(generation)+"/files", "files", a.parts...)
				}},
				{"farkeep", func(int) benchtest.Cost {
					cmd := exec.Command(a.pusher, "restore", "attic", "photos", "latest", "--to", to, "--site", filepath.Join(site.dir, "site.toml"),
						"--restore-key", a.restore, "--address", ours)
					return fetch("", cmd, a.parts...)
				}},
			})
		})
	}
}
