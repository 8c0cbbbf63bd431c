/* Preloaded into the harness: in a process that calls `faults_arm`, the n-th call that changes a file below a folder
   fails with an error number, or ends the process half-way through it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_long counted;
static long first = -1, last = -1;
static int failure;

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

/* Calls number `from` to `to` below `path` fail with `error`; with 0 the process is killed instead. */
void faults_arm(const char *path, long from, long to, int error) {
    snprintf(folder, sizeof folder, "%s/", path);
    failure = error;
    last = to;
    first = from;
    atomic_store(&counted, 0);
}

long faults_counted(void) { return atomic_load(&counted); }

static int is_chosen(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    long number = atomic_fetch_add(&counted, 1);
    return first >= 0 && number >= first && number <= last;
}

static int fails(const char *path) {
    if (!is_chosen(path)) return 0;
    if (!failure) kill(getpid(), SIGKILL);
    errno = failure;
    return 1;
}

static int fails_at(int directory, const char *path) {
    char whole[PATH_MAX];
    if (!folder[0]) return 0;
    if (path[0] == '/' || directory == AT_FDCWD) return fails(path);
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    if (length < 0) return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return fails(whole);
}

static int is_chosen_file(int file) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_chosen(path);
}

static int fails_file(int file) {
    if (!is_chosen_file(file)) return 0;
    if (!failure) kill(getpid(), SIGKILL);
    errno = failure;
    return 1;
}

/* Writes tear: half of the bytes arrive before the failure. */
ssize_t write(int file, const void *bytes, size_t size) {
    if (is_chosen_file(file)) {
        REAL(write)(file, bytes, size / 2);
        if (!failure) kill(getpid(), SIGKILL);
        errno = failure;
        return -1;
    }
    return REAL(write)(file, bytes, size);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t offset) {
    if (is_chosen_file(file)) {
        REAL(pwrite64)(file, bytes, size / 2, offset);
        if (!failure) kill(getpid(), SIGKILL);
        errno = failure;
        return -1;
    }
    return REAL(pwrite64)(file, bytes, size, offset);
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t offset) { return pwrite64(file, bytes, size, offset); }

ssize_t writev(int file, const struct iovec *parts, int n) { return fails_file(file) ? -1 : REAL(writev)(file, parts, n); }
int fsync(int file) { return fails_file(file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails_file(file) ? -1 : REAL(fdatasync)(file); }
int ftruncate64(int file, off64_t size) { return fails_file(file) ? -1 : REAL(ftruncate64)(file, size); }
int ftruncate(int file, off_t size) { return fails_file(file) ? -1 : REAL(ftruncate)(file, size); }
int rename(const char *old, const char *new) { return fails(new) ? -1 : REAL(rename)(old, new); }
int link(const char *old, const char *new) { return fails(new) ? -1 : REAL(link)(old, new); }
int linkat(int a, const char *old, int b, const char *new, int flags) {
    return fails_at(b, new) ? -1 : REAL(linkat)(a, old, b, new, flags);
}
int unlink(const char *path) { return fails(path) ? -1 : REAL(unlink)(path); }
int unlinkat(int directory, const char *path, int flags) {
    return fails_at(directory, path) ? -1 : REAL(unlinkat)(directory, path, flags);
}
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }

#define MODE(flags, mode)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }
#define CHANGES(flags) (flags & (O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && fails(path) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && fails(path) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int directory, const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && fails_at(directory, path) ? -1 : REAL(openat)(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && fails_at(directory, path) ? -1 : REAL(openat64)(directory, path, flags, mode);
}
