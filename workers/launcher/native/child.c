/* Starts one process by vfork; see child.h.
 *
 * The child shares this process's memory, stack included, until it executes its program, and this process waits for that.
 * So between vfork and execve stand system calls only: nothing that allocates, locks, or changes memory but `failed`.
 * Descriptors, directory, umask, limits, mask and dispositions of signals are the child's own. All signals are blocked
 * meanwhile, so that no handler of ours runs in the child.
 *
 * A child that sets its CPUs itself moves to one where, on a busy machine, it waits for its turn, and this process with it.
 * When that has happened this process moves there first for a while, so that the next children inherit their CPUs: it
 * costs this process half as much again where nothing else runs, and a busy machine starts three times as many.
 * It also moves there when child after child has the same CPUs, and stays: the next one ends there, and nobody moves.
 */

#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    FAILED = 127,
    SLOW_NS = 1000000, /* a child that took longer has waited for its turn */
    INHERIT_MIN = 64,  /* so many children inherit their CPUs then, twice as many each time that it happens again ... */
    INHERIT_MAX = 1 << 13,
    ALIKE_MIN = 8, /* so many children in a row with the same CPUs */
    CPUS_BYTES = 1 << 13, /* of the largest set, as in plain_launches.py */
};

/* Like `_open` of spawn.py: neither a FIFO that nobody opens nor a terminal may do harm. */
static int open_stream(const char *path, int flags) {
    int fd = open(path, flags | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0666);
    if (fd >= 0) {
        int status = fcntl(fd, F_GETFL);
        if (status < 0 || fcntl(fd, F_SETFL, status & ~O_NONBLOCK) < 0)
            return -1;
    }
    return fd;
}

static int open_streams(const struct child *child) {
    const int output = O_WRONLY | O_CREAT | O_TRUNC;
    int in = *child->stdin_path ? open_stream(child->stdin_path, O_RDONLY) : child->files[0];
    int out = *child->stdout_path ? open_stream(child->stdout_path, output) : child->files[1];
    int err = child->files[2];
    if (*child->stderr_path)
        err = strcmp(child->stdout_path, child->stderr_path) == 0 ? out : open_stream(child->stderr_path, output);
    return in >= 0 && out >= 0 && err >= 0 && dup2(in, 0) == 0 && dup2(out, 1) == 1 && dup2(err, 2) == 2;
}

static int set_cpus(const unsigned char *cpus, size_t size) { return syscall(SYS_sched_setaffinity, 0, size, cpus) >= 0; }

static _Noreturn void become(const struct child *child, int inherits, volatile int *failed) {
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigset_t none;
    /* A file system may hold it up for hours: the program must not start when this process has long been given up. */
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if ((!inherits && !set_cpus(child->cpus, child->cpus_size)) || setsid() < 0)
        goto failure;
    umask(child->umask);
    if (chdir(child->cwd) < 0 || !open_streams(child))
        goto failure;
    for (size_t n = 0; n < child->limit_count; n++)
        if (setrlimit(child->limits[n].number, &child->limits[n].value) < 0)
            goto failure;
    for (const int *number = child->ignored; *number; number++)
        sigaction(*number, &standard, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0);
    execve(child->program, child->argv, child->envp);
failure:
    *failed = errno;
    _exit(FAILED);
}

/* Whether the last children had the same CPUs as this one. */
static int alike(const struct child *child) {
    static unsigned char cpus[CPUS_BYTES];
    static size_t size;
    static int number;
    if (child->cpus_size == size && memcmp(cpus, child->cpus, size) == 0)
        return number < ALIKE_MIN ? ++number == ALIKE_MIN : 1;
    number = 0;
    size = child->cpus_size <= sizeof cpus ? child->cpus_size : 0;
    memcpy(cpus, child->cpus, size);
    return 0;
}

pid_t start_child(const struct child *child) {
    static int to_inherit, next_time = INHERIT_MIN; /* so many children inherit their CPUs, and so many next time */
    static int pinned;                              /* this process has the CPUs of the last child */
    const int inherits = alike(child) || to_inherit > 0;
    volatile int failed = 0;
    sigset_t all, before;
    struct timespec began, ended;
    pid_t pid;
    if (inherits || pinned)
        if (!set_cpus(inherits ? child->cpus : child->own_cpus, inherits ? child->cpus_size : child->own_cpus_size))
            return -1;
    pinned = inherits;
    clock_gettime(CLOCK_MONOTONIC, &began);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid = vfork();
    if (pid == 0)
        become(child, inherits, &failed);
    sigprocmask(SIG_SETMASK, &before, NULL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    if (to_inherit > 0)
        to_inherit--;
    else if (inherits)
        ; /* it shows nothing of the other way */
    else if ((ended.tv_sec - began.tv_sec) * 1000000000L + ended.tv_nsec - began.tv_nsec > SLOW_NS) {
        to_inherit = next_time;
        if (next_time < INHERIT_MAX)
            next_time *= 2;
    } else if (next_time > INHERIT_MIN)
        next_time /= 2;
    if (pid > 0 && failed) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
        pid = -1;
    }
    return pid;
}
