package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"farkeep/appliance/boot"
	"farkeep/appliance/logbook"
	"farkeep/appliance/part"
	"farkeep/appliance/status"
	"farkeep/appliance/supervise"
	"farkeep/shared/hint"
	"farkeep/shared/settings"
	"farkeep/shared/tomlfile"
	"farkeep/shared/usage"

	"github.com/spf13/cobra"
)

const defaultSettings = "/etc/farkeep/farkeep.toml"

func runCommand(env Env) *cobra.Command {
	paths := part.ServicePaths()
	var file string
	var debug bool
	cmd := &cobra.Command{
		Use:   "run",
		Short: "be the appliance as a service of this system",
		Long: `run supervises the appliance's parts on a Linux system that has a VPN of its own.
It needs root, to give each part its own user, and is meant to be started by
systemd: docs/operations-service.md has the unit.`,
		Example: "  farkeep-appliance run --settings /etc/farkeep/farkeep.toml",
		Args:    usage.Args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runService(cmd.Context(), env, file, part.Header{Paths: paths, Debug: debug})
		},
	}
	cmd.Flags().StringVar(&file, "settings", defaultSettings, "the appliance's settings")
	cmd.Flags().StringVar(&paths.Run, "run-dir", paths.Run, "folder for status files and sockets")
	cmd.Flags().StringVar(&paths.State, "state-dir", paths.State, "folder for what survives a restart")
	cmd.Flags().StringVar(&paths.Media, "media-dir", paths.Media, "folder below which the disk is mounted")
	cmd.Flags().BoolVar(&debug, "debug", false, "log more")
	return cmd
}

func checkCommand(env Env) *cobra.Command {
	return &cobra.Command{
		Use:     "check FILE",
		Short:   "say whether a farkeep.toml is right, and if not, where",
		Example: "  farkeep-appliance check /etc/farkeep/farkeep.toml",
		Args:    usage.Args(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			cfg, err := loadSettings(args[0])
			if err != nil {
				return err
			}
			for _, doubt := range cfg.History.Doubts() {
				fmt.Fprintf(env.Stderr, "farkeep-appliance: %s: %s\n", args[0], doubt)
			}
			_, err = fmt.Fprintf(env.Stdout, "%s: the settings of %s, site %s, are in order\n", args[0], cfg.Name, cfg.Site)
			return err
		},
	}
}

func loadSettings(file string) (*settings.Appliance, error) {
	text, err := tomlfile.ReadText(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, hint.Exit(hint.ExitUsage, hint.Because(fmt.Errorf("read the settings: %w", err),
			"copy the file that \"farkeep-image site init\" made for this appliance there, or name another"))
	}
	if err != nil {
		return nil, hint.Exit(hint.ExitUsage, fmt.Errorf("read the settings: %w", err))
	}
	cfg, err := settings.Parse(file, text)
	if err != nil {
		return nil, hint.Exit(hint.ExitUsage, hint.Because(err, "correct this line"))
	}
	return cfg, nil
}

// runService is the supervisor under systemd.
func runService(ctx context.Context, env Env, file string, h part.Header) error {
	cfg, err := loadSettings(file)
	if err != nil {
		return err
	}
	if os.Getuid() != 0 {
		return hint.Because(errors.New("the supervisor needs root, to give each part its own user"),
			"start it by systemd, with the unit of docs/operations-service.md")
	}
	// A systemd that is not there must not be waited for.
	notify, err := newNotifier(env.Getenv("NOTIFY_SOCKET"), env.Getenv("WATCHDOG_USEC"))
	if err != nil {
		return err
	}
	level := slog.LevelInfo
	if h.Debug {
		level = slog.LevelDebug
	}
	s := &system{book: logbook.New(), header: h}
	s.log = s.book.Logger(level)
	s.book.ToJournal(env.Stderr, false)
	defer s.book.Close(2 * time.Second)

	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	if s.reaper, err = supervise.NewReaper(life); err != nil {
		return err
	}
	if err := s.makeFolders(); err != nil {
		return err
	}
	marker := filepath.Join(h.Paths.State, "supervisor")
	_, markerErr := os.Lstat(marker)
	if err := os.MkdirAll(marker, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", marker, err)
	}
	if err := s.book.ToFile(filepath.Join(h.Paths.State, "log"), part.ReceiverUID); err != nil {
		s.log.Warn("no log file", "err", err)
	}
	s.boot = status.Boot{
		Version: version(), BootID: boot.BootID(), Board: "service",
		FirstBoot: errors.Is(markerErr, fs.ErrNotExist),
	}
	s.log.Info("starting", "version", s.boot.Version, "settings", file)
	s.beat()
	go notify.keep(life, s.healthy, s.log)
	defer func() {
		if err := notify.send("STOPPING=1"); err != nil {
			s.log.Warn("systemd was not told", "err", err)
		}
	}()
	return s.supervise(ctx, cfg)
}

// notifier tells systemd how the service is: sd_notify(3), which is one
// datagram to a socket.
type notifier struct {
	conn     net.Conn      // nil: nobody listens
	watchdog time.Duration // 0: nobody waits
}

func newNotifier(socket, usec string) (*notifier, error) {
	n := &notifier{}
	if socket == "" {
		return n, nil
	}
	// A leading "@" is an abstract socket, for Go as for systemd.
	conn, err := net.Dial("unixgram", socket)
	if err != nil {
		return nil, fmt.Errorf("tell systemd: %w", err)
	}
	n.conn = conn
	if us, err := strconv.ParseInt(usec, 10, 64); err == nil && us > 0 {
		n.watchdog = time.Duration(us) * time.Microsecond
	}
	return n, nil
}

func (n *notifier) send(state string) error {
	if n.conn == nil {
		return nil
	}
	if err := n.conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	_, err := n.conn.Write([]byte(state))
	return err
}

// keep says that the service is ready, and then that it is healthy, twice as
// often as systemd wants.
func (n *notifier) keep(ctx context.Context, healthy func() error, log *slog.Logger) {
	if err := n.send("READY=1"); err != nil {
		log.Warn("systemd was not told", "err", err)
	}
	if n.watchdog == 0 {
		return
	}
	tick := time.NewTicker(n.watchdog / 2)
	defer tick.Stop()
	for {
		err := healthy()
		if err == nil {
			err = n.send("WATCHDOG=1")
		}
		if err != nil {
			log.Error("systemd's watchdog was not fed", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
