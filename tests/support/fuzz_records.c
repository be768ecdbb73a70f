/* Gives changed messages to the parser of the native launcher: fuzz_records ROUNDS FILE...
 *
 * Each file is a message; each round changes some of its bytes, or cuts it, always in the same way. What is a plain
 * launch is made, too, and so are the first and the last one of a run. Prints how many were that, and how many messages there were. */

#include "launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SIZE_MAX_BYTES = 1 << 16 };

static unsigned long long state = 88172645463325252ULL;

static unsigned random_below(size_t bound) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)(state % bound);
}

static int try_message(const unsigned char *bytes, size_t size);

static int try_run(const unsigned char *bytes, size_t size) {
    struct run_record run;
    struct buffer element = {0};
    int plain = 0;
    if (!read_run(bytes, size, &run))
        return 0;
    for (int last = 0; last < 2; last++) {
        element.size = 0;
        if (put_element(&element, &run, last ? run.number - 1 : 0))
            plain |= try_message(element.at, element.size);
    }
    free(element.at);
    return plain;
}

/* 1 when it is a plain launch. The bytes are a block of their own, so that each access behind them is noticed. */
static int try_message(const unsigned char *bytes, size_t size) {
    static const char *shared[] = {"A=0", "B=1", "PILOTQ_INDEX=2"};
    const struct variables variables = {shared, 3};
    struct launch_record record;
    unsigned char *copy = malloc(size ? size : 1);
    enum record_kind kind;
    int plain;
    if (!copy)
        exit(2);
    memcpy(copy, bytes, size);
    (void)object_size((struct reader){copy, copy + size});
    kind = read_record(copy, size, &record);
    plain = kind == PLAIN_LAUNCH || (kind == LAUNCH_RUN && try_run(copy, size));
    if (kind == PLAIN_LAUNCH) {
        struct launch *launch = make_launch(&record, copy, size, &variables);
        size_t length = 0;
        if (!launch)
            exit(2);
        for (const char **one = launch->argv; *one; one++)
            length += strlen(*one);
        for (const char **one = launch->envp; *one; one++)
            length += strlen(*one);
        if (!length)
            exit(3);
        free(launch);
    }
    free(copy);
    return plain;
}

int main(int count, char **arguments) {
    static unsigned char seed[SIZE_MAX_BYTES], bytes[SIZE_MAX_BYTES];
    const int rounds = atoi(arguments[1]);
    long plain = 0, all = 0;
    for (int n = 2; n < count; n++) {
        FILE *file = fopen(arguments[n], "rb");
        size_t whole = file ? fread(seed, 1, sizeof seed, file) : 0;
        if (!whole)
            return 2;
        fclose(file);
        for (int round = 0; round < rounds; round++, all++) {
            size_t size = random_below(8) ? whole : random_below(whole);
            memcpy(bytes, seed, size);
            for (unsigned changes = random_below(4); size && changes; changes--)
                bytes[random_below(random_below(2) ? size : size < 24 ? size : 24)] = (unsigned char)random_below(256);
            plain += try_message(bytes, size);
        }
    }
    printf("%ld %ld\n", plain, all);
    return 0;
}
