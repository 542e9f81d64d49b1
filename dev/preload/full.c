/* A disk that is full, under -disks: this library stands between a server and its C library's writes.
 *
 * A page of memory, mapped from the file that WALLET_DEV_DISK names, holds a folder's path while its disk
 * is full. Then no file in it grows: a write beyond a file's end, and a reservation of space, are answered by
 * ENOSPC, or by a short write up to the end. What is allocated already may be written again, as on most file
 * systems, so a server goes on until it needs more. Sparse growth (ftruncate) takes no space: it is let through.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { page = 4096, vectors = 1024 };

static const volatile char *disk; /* NULL before the constructor has run */

__attribute__((constructor)) static void begin(void)
{
	const char *file = getenv("WALLET_DEV_DISK");
	int fd = file ? open(file, O_RDONLY | O_CLOEXEC) : -1;
	if (fd < 0)
		return;
	void *mapped = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0);
	if (mapped != MAP_FAILED)
		disk = mapped;
	close(fd);
}

/* end is the size of a file whose disk is full, and -1 of every other. */
static off64_t end(int fd)
{
	if (!disk || disk[0] != '/')
		return -1;
	char folder[page], link[64], path[page];
	for (int i = 0; i < page; i++)
		if (!(folder[i] = disk[i]))
			break;
	folder[page - 1] = 0;
	struct stat64 is;
	if (fstat64(fd, &is) || !S_ISREG(is.st_mode))
		return -1;
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof path - 1);
	if (n < 0)
		return -1;
	path[n] = 0;
	size_t prefix = strlen(folder);
	if (strncmp(path, folder, prefix) || path[prefix] != '/')
		return -1;
	return is.st_size;
}

/* room is how many of n bytes may be written at an offset; 0 with errno set says that none may. */
static size_t room(int fd, off64_t offset, size_t n)
{
	int before = errno;
	off64_t size = end(fd);
	errno = before;
	if (size < 0 || n == 0 || offset + (off64_t)n <= size)
		return n;
	if (offset < size)
		return size - offset;
	errno = ENOSPC;
	return 0;
}

/* here is where a write without an offset goes. */
static off64_t here(int fd)
{
	if (!disk || disk[0] != '/')
		return 0;
	int before = errno;
	off64_t at = fcntl(fd, F_GETFL) & O_APPEND ? end(fd) : lseek64(fd, 0, SEEK_CUR);
	errno = before;
	return at < 0 ? 0 : at; /* a pipe, or a file elsewhere: room asks again */
}

/* fit shortens vectors to what there is room for; 0 says that there is none. */
static int fit(int fd, off64_t offset, const struct iovec *from, int n, struct iovec *to)
{
	size_t all = 0;
	if (n < 0 || n > vectors)
		n = vectors;
	for (int i = 0; i < n; i++)
		all += from[i].iov_len;
	size_t left = room(fd, offset, all);
	if (all > 0 && left == 0)
		return 0;
	for (int i = 0; i < n; i++) {
		to[i] = from[i];
		if (to[i].iov_len >= left && left < all) {
			to[i].iov_len = left;
			return i + 1;
		}
		left -= to[i].iov_len;
		all -= to[i].iov_len;
	}
	return n;
}

#define next(type, name, ...)                                        \
	static type (*real)(__VA_ARGS__);                            \
	if (!real)                                                   \
		real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

ssize_t write(int fd, const void *from, size_t n)
{
	next(ssize_t, "write", int, const void *, size_t);
	size_t fits = room(fd, here(fd), n);
	return n && !fits ? -1 : real(fd, from, fits);
}

ssize_t writev(int fd, const struct iovec *from, int n)
{
	next(ssize_t, "writev", int, const struct iovec *, int);
	struct iovec to[vectors];
	int fits = fit(fd, here(fd), from, n, to);
	return n > 0 && !fits ? -1 : real(fd, to, fits);
}

#define PWRITE(name)                                                            \
	ssize_t name(int fd, const void *from, size_t n, off64_t offset)        \
	{                                                                       \
		next(ssize_t, #name, int, const void *, size_t, off64_t);       \
		size_t fits = room(fd, offset, n);                              \
		return n && !fits ? -1 : real(fd, from, fits, offset);          \
	}
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(name)                                                           \
	ssize_t name(int fd, const struct iovec *from, int n, off64_t offset)   \
	{                                                                       \
		next(ssize_t, #name, int, const struct iovec *, int, off64_t);  \
		struct iovec to[vectors];                                       \
		int fits = fit(fd, offset, from, n, to);                        \
		return n > 0 && !fits ? -1 : real(fd, to, fits, offset);        \
	}
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define FALLOCATE(name)                                                         \
	int name(int fd, int mode, off64_t offset, off64_t n)                   \
	{                                                                       \
		next(int, #name, int, int, off64_t, off64_t);                   \
		return room(fd, offset, n) == (size_t)n ? real(fd, mode, offset, n) : (errno = ENOSPC, -1); \
	}
FALLOCATE(fallocate)
FALLOCATE(fallocate64)

#define POSIX_FALLOCATE(name)                                                   \
	int name(int fd, off64_t offset, off64_t n)                             \
	{                                                                       \
		next(int, #name, int, off64_t, off64_t);                        \
		return room(fd, offset, n) == (size_t)n ? real(fd, offset, n) : ENOSPC; /* not by errno */ \
	}
POSIX_FALLOCATE(posix_fallocate)
POSIX_FALLOCATE(posix_fallocate64)
