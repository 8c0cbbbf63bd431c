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
    return first <= number && number <= last;
}

/* The path of a file descriptor, with `name` below it when there is one; empty when it has none. */
static const char *path_of(int file, const char *name, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = folder[0] ? readlink(link, path, PATH_MAX / 2) : -1;
    path[length < 0 ? 0 : length] = 0;
    if (length >= 0 && name) snprintf(path + length, PATH_MAX - length, "/%s", name);
    return path;
}

static int is_chosen_file(int file) {
    char path[PATH_MAX];
    return is_chosen(path_of(file, NULL, path));
}

static int is_chosen_at(int directory, const char *name) {
    char path[PATH_MAX];
    return is_chosen(name[0] == '/' || directory == AT_FDCWD ? name : path_of(directory, name, path));
}

static int fail(void) {
    if (!failure) kill(getpid(), SIGKILL);
    errno = failure;
    return -1;
}

/* Writes tear: half of the bytes arrive. */
ssize_t write(int file, const void *bytes, size_t size) {
    if (!is_chosen_file(file)) return REAL(write)(file, bytes, size);
    REAL(write)(file, bytes, size / 2);
    return fail();
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t offset) {
    if (!is_chosen_file(file)) return REAL(pwrite64)(file, bytes, size, offset);
    REAL(pwrite64)(file, bytes, size / 2, offset);
    return fail();
}

ssize_t pwrite(int file, const void *bytes, size_t size, off_t offset) { return pwrite64(file, bytes, size, offset); }

ssize_t writev(int file, const struct iovec *parts, int n) {
    return is_chosen_file(file) ? fail() : REAL(writev)(file, parts, n);
}

int fsync(int file) { return is_chosen_file(file) ? fail() : REAL(fsync)(file); }
int fdatasync(int file) { return is_chosen_file(file) ? fail() : REAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { return is_chosen_file(file) ? fail() : REAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return is_chosen_file(file) ? fail() : REAL(ftruncate64)(file, size); }
int rename(const char *old, const char *new) { return is_chosen(new) ? fail() : REAL(rename)(old, new); }
int link(const char *old, const char *new) { return is_chosen(new) ? fail() : REAL(link)(old, new); }
int unlink(const char *path) { return is_chosen(path) ? fail() : REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { return is_chosen(path) ? fail() : REAL(mkdir)(path, mode); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    return is_chosen_at(to, new) ? fail() : REAL(linkat)(from, old, to, new, flags);
}

int unlinkat(int directory, const char *path, int flags) {
    return is_chosen_at(directory, path) ? fail() : REAL(unlinkat)(directory, path, flags);
}

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
    return CHANGES(flags) && is_chosen(path) ? fail() : REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && is_chosen(path) ? fail() : REAL(open64)(path, flags, mode);
}
int openat(int directory, const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && is_chosen_at(directory, path) ? fail() : REAL(openat)(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    MODE(flags, mode)
    return CHANGES(flags) && is_chosen_at(directory, path) ? fail() : REAL(openat64)(directory, path, flags, mode);
}
