/* Starts one process by vfork; see child.h.
 *
 * The child shares this process's memory, stack included, until it executes its program, and this process waits for that.
 * So between vfork and execve stand system calls only: nothing that allocates, locks, or changes memory but `failed`.
 * Descriptors, directory, umask, limits, mask and dispositions of signals are the child's own. All signals are blocked
 * meanwhile, so that no handler of ours runs in the child.
 */

#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FAILED = 127 };

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

static _Noreturn void become(const struct child *child, volatile int *failed) {
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigset_t none;
    if (syscall(SYS_sched_setaffinity, 0, child->cpus_size, child->cpus) < 0 || setsid() < 0)
        goto failure;
    umask(child->umask);
    if (chdir(child->cwd) < 0 || !open_streams(child))
        goto failure;
    for (size_t n = 0; n < child->limit_count; n++)
        if (setrlimit((__rlimit_resource_t)child->limits[n].number, &child->limits[n].value) < 0)
            goto failure;
    for (const int *number = child->ignored; *number; number++)
        sigaction(*number, &standard, NULL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execve(child->program, child->argv, child->envp);
failure:
    *failed = errno;
    _exit(FAILED);
}

pid_t start_child(const struct child *child) {
    volatile int failed = 0;
    sigset_t all, before;
    pid_t pid;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid = vfork();
    if (pid == 0)
        become(child, &failed);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (pid > 0 && failed) {
        while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
            ;
        pid = -1;
    }
    return pid;
}
