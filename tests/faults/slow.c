/* A slow file system: calls that touch files below FAULTS_SLOW_UNDER take FAULTS_SLOW_MICROSECONDS longer.

   Loaded with LD_PRELOAD, so that the calls of Python, Orbax and tensorstore are slow alike. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static void slow(const char *path) {
    const char *under = getenv("FAULTS_SLOW_UNDER"), *microseconds = getenv("FAULTS_SLOW_MICROSECONDS");
    if (under && microseconds && path && !strncmp(path, under, strlen(under))) usleep(atoi(microseconds));
}

static void slow_file(int file) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length > 0) { path[length] = 0; slow(path); }
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int mode_of(int flags, va_list more) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; }
#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = mode_of(flags, more); va_end(more); \
        slow(path); return NEXT(name)(path, flags, mode); }
OPENS(open)
OPENS(open64)
#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); int mode = mode_of(flags, more); va_end(more); \
        slow(path); return NEXT(name)(folder, path, flags, mode); }
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t write(int file, const void *data, size_t count) { slow_file(file); return NEXT(write)(file, data, count); }
ssize_t pwrite(int file, const void *data, size_t count, off_t at) { slow_file(file); return NEXT(pwrite)(file, data, count, at); }
ssize_t pwrite64(int file, const void *data, size_t count, off64_t at) { slow_file(file); return NEXT(pwrite64)(file, data, count, at); }
ssize_t read(int file, void *data, size_t count) { slow_file(file); return NEXT(read)(file, data, count); }
ssize_t pread64(int file, void *data, size_t count, off64_t at) { slow_file(file); return NEXT(pread64)(file, data, count, at); }
int fsync(int file) { slow_file(file); return NEXT(fsync)(file); }
int fdatasync(int file) { slow_file(file); return NEXT(fdatasync)(file); }
int rename(const char *from, const char *to) { slow(from); return NEXT(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { slow(path); return NEXT(mkdir)(path, mode); }
int unlink(const char *path) { slow(path); return NEXT(unlink)(path); }
