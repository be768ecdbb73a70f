/* Launches and their chains, as `workers/launcher/chain.py` has them for Python. */

#ifndef PILOTQ_LAUNCH_H
#define PILOTQ_LAUNCH_H

#include "records.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct chain;

/* One launch: in a chain until it is started, then running. The strings lie in the same block of memory. */
struct launch {
    struct launch *next;        /* in its chain */
    struct launch *same_bucket; /* of the table of keys */
    struct chain *chain;
    int64_t key;
    const char **argv, **envp;
    const char *cwd, *stdin_path, *stdout_path, *stderr_path;
    const unsigned char *message; /* that it was made from */
    size_t message_size;
    void *context, *files[2]; /* of the caller */
    int fds[2];
    pid_t pid;
    double began, running_since, started; /* monotonic before and after the start, unix time after it */
    struct launch *older, *newer;         /* among those that run */
    struct element element;
};

/* Launches that are started one after the other. */
struct chain {
    struct launch *first, *last, *running;
    struct chain *next; /* of those whose first launch may start */
};

/* Environment variables that launches share: "NAME=value", in the order of `strcmp`. */
struct variables {
    const char **at;
    size_t count;
};

/* A launch from its message; NULL when memory is short. `record` is what `read_record` has found in the message. */
struct launch *make_launch(
    const struct launch_record *record, const unsigned char *message, size_t size, const struct variables *shared);

#endif
