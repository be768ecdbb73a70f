/* Makes launches from their messages; see launch.h. */

#include "launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MARK_ROOM = 64 }; /* the names and signs of the two marks, and a number */

/* The place of a variable among the shared ones; -1 if it is not there. `size` is that of its name with the sign. */
static ptrdiff_t place_of(const struct variables *shared, const char *variable, size_t size) {
    size_t low = 0, high = shared->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strncmp(shared->at[middle], variable, size);
        if (order == 0)
            return (ptrdiff_t)middle;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return -1;
}

/* Put a variable in the place of one of the same name, or behind the others. */
static void set_variable(struct launch *launch, const struct variables *shared, size_t *count, const char *variable) {
    size_t size = (size_t)(strchr(variable, '=') - variable) + 1;
    ptrdiff_t place = place_of(shared, variable, size);
    if (place < 0)
        for (size_t n = shared->count; n < *count && place < 0; n++)
            if (strncmp(launch->envp[n], variable, size) == 0)
                place = (ptrdiff_t)n;
    launch->envp[place < 0 ? (*count)++ : (size_t)place] = variable;
}

/* Copy bytes to `*free_at`, and go behind them. */
static char *copy(char **free_at, struct text text) {
    char *begin = *free_at;
    if (text.size)
        memcpy(begin, text.at, text.size);
    *free_at += text.size;
    return begin;
}

static const char *copy_string(char **free_at, struct text text) {
    char *begin = copy(free_at, text);
    *(*free_at)++ = 0;
    return begin;
}

static void fill_environment(
    struct launch *launch, const struct launch_record *record, const struct variables *shared, char **free_at) {
    struct reader from = record->env;
    size_t count = shared->count;
    const char *mark;
    if (count)
        memcpy(launch->envp, shared->at, count * sizeof *shared->at);
    for (uint32_t n = 0; n < record->variables; n++) {
        const char *variable = copy(free_at, next_string(&from));
        *(*free_at)++ = '=';
        copy_string(free_at, next_string(&from));
        set_variable(launch, shared, &count, variable);
    }
    mark = copy(free_at, (struct text){(const unsigned char *)"PILOTQ_TASK_ID=", 15});
    copy_string(free_at, record->id);
    set_variable(launch, shared, &count, mark);
    mark = *free_at;
    *free_at += sprintf(*free_at, "PILOTQ_EXECUTION=%lld", (long long)record->attempt) + 1;
    set_variable(launch, shared, &count, mark);
    launch->envp[count] = NULL;
}

struct launch *make_launch(
    const struct launch_record *record, const unsigned char *message, size_t size, const struct variables *shared) {
    /* In the message each string has a head of a byte at least, here it has an end of one: so the strings need no more
     * room than the message has, the marks apart. */
    size_t pointers = record->argc + 1 + shared->count + record->variables + 3;
    size_t room = sizeof(struct launch) + pointers * sizeof(char *) + 2 * size + MARK_ROOM;
    struct launch *launch = malloc(room);
    struct reader from = record->argv;
    char *free_at;
    if (!launch)
        return NULL;
    memset(launch, 0, sizeof *launch);
    launch->argv = (const char **)(launch + 1);
    launch->envp = launch->argv + record->argc + 1;
    free_at = (char *)(launch->argv + pointers);
    launch->key = record->key;
    launch->element = record->element;
    launch->message_size = size;
    launch->message = (unsigned char *)copy(&free_at, (struct text){message, size});
    for (uint32_t n = 0; n < record->argc; n++)
        launch->argv[n] = copy_string(&free_at, next_string(&from));
    launch->argv[record->argc] = NULL;
    launch->cwd = copy_string(&free_at, record->cwd);
    launch->stdin_path = copy_string(&free_at, record->stdin_path);
    launch->stdout_path = copy_string(&free_at, record->stdout_path);
    launch->stderr_path = copy_string(&free_at, record->stderr_path);
    fill_environment(launch, record, shared, &free_at);
    return launch;
}
