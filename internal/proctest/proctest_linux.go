package proctest

import (
	"os"
	"syscall"
)

// nobody is the user that root's children are in a namespace of their own.
const nobody = 65534

// NotRoot has a child of root run as somebody else who may use a folder, since some servers refuse to be
// root. That is the folder's owner. If the owner is root, it is nobody in a user namespace of its own, where
// nobody may touch root's files. Of another user's child it returns nil: no change is needed.
func NotRoot(folder string) (*syscall.SysProcAttr, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	info, err := os.Stat(folder)
	if err != nil {
		return nil, err
	}
	if owner := info.Sys().(*syscall.Stat_t); owner.Uid != 0 {
		return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}}, nil
	}
	standsForRoot := []syscall.SysProcIDMap{{ContainerID: nobody, HostID: 0, Size: 1}}
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		Credential:  &syscall.Credential{Uid: nobody, Gid: nobody},
		UidMappings: standsForRoot,
		GidMappings: standsForRoot,
	}, nil
}
