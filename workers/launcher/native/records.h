/* Reads and writes the messages of workers/protocol.py: frames of msgpack lists. Knows nothing of Python or processes. */

#ifndef PILOTQ_RECORDS_H
#define PILOTQ_RECORDS_H

#include <stddef.h>
#include <stdint.h>

/* Bytes within a message. */
struct text {
    const unsigned char *at;
    size_t size;
};

/* What is left to be read of a message. */
struct reader {
    const unsigned char *at;
    const unsigned char *end;
};

/* The element of an array that a launch is; its index is -1 where it is none. */
struct element {
    int64_t index, place;
    double origin;
};

/* A Launch message; strings lie in the message itself. */
struct launch_record {
    int64_t key, attempt, after;
    struct text id, base, slot, cwd, stdin_path, stdout_path, stderr_path;
    struct reader argv, env; /* `argc` strings, `variables` pairs of strings */
    uint32_t argc, variables;
    struct element element;
};

/* A LaunchRun message: so many launches, made from one, the template, which lies in the message itself. */
struct run_record {
    int64_t key, after; /* of the template */
    int64_t number, step;
    struct element element; /* of the template */
    struct reader launch;
    struct reader own; /* a list of strings for each that was not made yet; empty where they have none of their own */
};

enum record_kind {
    OTHER_RECORD, /* also a launch that `read_record` does not call plain */
    FORGET_RECORD,
    PLAIN_LAUNCH,
    LAUNCH_RUN,
};

/* The size of the first msgpack object; 0 when there is no whole one. */
size_t object_size(struct reader from);

/* The elements of a frame's list: `*list` is set behind the list's head. 0 when it is none. */
int read_list(struct reader *list, uint32_t *count);

/* What the message is. A launch is plain that needs no script, files, suffix, or new directory, has absolute paths, an
 * attempt, and nothing in it that the system would refuse: only then `*record` is set. */
enum record_kind read_record(const unsigned char *at, size_t size, struct launch_record *record);

/* Whether a message of the kind LAUNCH_RUN is whole; only then `*run` is set. */
int read_run(const unsigned char *at, size_t size, struct run_record *run);

/* The next string of a launch's `argv` or `env`. */
struct text next_string(struct reader *from);

/* Bytes that grow. `failed` once memory was refused: then nothing more is added. */
struct buffer {
    unsigned char *at;
    size_t size, room;
    int failed;
};

void put_raw(struct buffer *to, const void *at, size_t size);
void put_list(struct buffer *to, unsigned count); /* of fewer than 16 */
void put_word(struct buffer *to, const char *word); /* of fewer than 32 bytes */
void put_bytes(struct buffer *to, const void *at, size_t size);
void put_integer(struct buffer *to, int64_t value);
void put_real(struct buffer *to, double value);

/* The Launch message of the element with this number, 0 for the first; 0 when the template cannot be filled in. Those that
 * have strings of their own are made in their order. */
int put_element(struct buffer *to, struct run_record *run, int64_t number);

#endif
