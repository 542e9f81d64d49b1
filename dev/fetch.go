// The cache: what is downloaded once per user and shared by all checkouts and all stacks that run at the same
// time. A folder in it is either absent or complete.

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// cacheFolder is where a user's programs keep what they can fetch again.
func cacheFolder() (string, error) {
	if dir, err := os.UserCacheDir(); err == nil {
		dir = filepath.Join(dir, "wallet-dev")
		return dir, os.MkdirAll(dir, 0o755)
	}
	return publicFolder() // no home
}

// publicFolder is a folder of ours that every user of the machine can reach: not below a home of mode 0700.
func publicFolder() (string, error) {
	dir := filepath.Join("/var/tmp", "wallet-dev-"+strconv.Itoa(os.Getuid()))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return "", err
	}
	// Anybody may make folders there; run nothing from one that another made.
	if owner := info.Sys().(*syscall.Stat_t).Uid; !info.IsDir() || int(owner) != os.Getuid() {
		return "", fmt.Errorf("%s belongs to somebody else: remove it", dir)
	}
	return dir, os.Chmod(dir, 0o755)
}

// once has fill make a temporary folder and renames that to dir. Who comes second waits and finds it made.
func once(ctx context.Context, dir string, fill func(tmp string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	for {
		err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		} else if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	tmp := dir + ".tmp" // ours alone while we hold the lock; what a killed one left goes first
	if err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := fill(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// download fetches url into file and refuses it unless its SHA-256 is the one expected.
func download(ctx context.Context, url, file, sha string, progress func(percent int)) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, resp.Status)
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	sum := sha256.New()
	var got int64
	for next := int64(0); ; { // in slices, to report progress
		n, err := io.CopyN(io.MultiWriter(out, sum), resp.Body, 1<<20)
		got += n
		if percent := got * 100 / max(resp.ContentLength, 1); resp.ContentLength > 0 && percent >= next {
			progress(int(percent))
			next = percent/20*20 + 20
		}
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	if is := hex.EncodeToString(sum.Sum(nil)); is != sha {
		return fmt.Errorf("%s has SHA-256 %s, not %s: it is not what was pinned", url, is, sha)
	}
	return out.Close()
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
