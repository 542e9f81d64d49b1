//go:build !linux

package proctest

import (
	"errors"
	"os"
	"syscall"
)

// NotRoot has a child of root run as somebody else who may use a folder, which only Linux can. Of another
// user's child it returns nil: no change is needed.
func NotRoot(string) (*syscall.SysProcAttr, error) {
	if os.Getuid() == 0 {
		return nil, errors.New("this system has no user namespaces: run the test as another user than root")
	}
	return nil, nil
}
