package proctest

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// foldersKept is how many failed runs of a name keep their folder: one can hold gigabytes of a database.
const foldersKept = 3

// foldersYoung is how long a folder stays in any case: an older checkout's run takes no lock.
const foldersYoung = time.Hour

// Folder makes a folder in /var/tmp, wallet-NAME-something, for the data and logs of a run's servers, and has
// them enter it whoever they run as. The caller removes it, unless the run failed. Of the same name's earlier
// folders it removes all but the newest few and the young, and none that a living process made here.
func Folder(name string) (string, error) { return folderIn("/var/tmp", name) }

func folderIn(parent, name string) (string, error) {
	sweep(filepath.Join(parent, "wallet-"+name+"-*"))
	folder, err := os.MkdirTemp(parent, "wallet-"+name+"-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(folder, 0o755); err != nil {
		return "", err
	}
	// The folder's lock says that it is in use. It is never let go of: the process' end does that, however it
	// ends. Children do not get it.
	fd, err := syscall.Open(folder, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	return folder, syscall.Flock(fd, syscall.LOCK_EX)
}

// sweep removes folders but the newest. What it cannot remove stays: it is no fault of the run that begins.
func sweep(pattern string) {
	found, _ := filepath.Glob(pattern)
	changed := make(map[string]time.Time, len(found))
	for _, folder := range found {
		if info, err := os.Lstat(folder); err == nil {
			changed[folder] = info.ModTime()
		}
	}
	slices.SortFunc(found, func(a, b string) int { return changed[b].Compare(changed[a]) })
	for _, folder := range found[min(len(found), foldersKept):] {
		if time.Since(changed[folder]) < foldersYoung {
			continue
		}
		dir, err := os.Open(folder)
		if err != nil {
			continue
		}
		if syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
			os.RemoveAll(folder)
		}
		dir.Close()
	}
}
