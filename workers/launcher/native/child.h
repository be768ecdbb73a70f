/* Starts one process by vfork. Knows nothing of Python or messages. */

#ifndef PILOTQ_CHILD_H
#define PILOTQ_CHILD_H

#include <signal.h>
#include <stddef.h>
#include <sys/resource.h>
#include <sys/types.h>

struct limit {
    int number;
    struct rlimit value;
};

/* What a child becomes. A path that is not empty stands for the descriptor of its stream. */
struct child {
    const char *program, *cwd, *stdin_path, *stdout_path, *stderr_path;
    char *const *argv, *const *envp;
    int files[3];
    const unsigned char *cpus, *own_cpus; /* its and this process's, as of sched_setaffinity */
    size_t cpus_size, own_cpus_size;
    mode_t umask;
    const struct limit *limits;
    size_t limit_count;
    const int *ignored; /* signals that this process ignores; ends with 0 */
};

/* The number of the process, which runs its program; -1 when that failed: then nothing of it is left. This process
 * may be left with the CPUs of the child. */
pid_t start_child(const struct child *child);

#endif
