/* Reads and writes the messages of workers/protocol.py; see records.h. */

#include "records.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    DEPTH_MAX = 32,
    LAUNCH_FIELDS = 18, /* the tag is the first field */
    KEY_FIELD = 1,
    ARGV_FIELD = 6,
    AFTER_FIELD = 13,
    ELEMENT_FIELD = 17,
    ELEMENT_FIELDS = 3,
    RUN_FIELDS = 5,
    RUN_MAX = 1 << 16, /* elements of a run */
    OWN_MARKS = 4,
};

static size_t left(const struct reader *from) { return (size_t)(from->end - from->at); }

/* An unsigned number of `size` bytes, most significant first; 0 with `*good` cleared when they are not there. */
static uint64_t read_number(struct reader *from, size_t size, int *good) {
    uint64_t value = 0;
    if (left(from) < size) {
        *good = 0;
        return 0;
    }
    for (size_t n = 0; n < size; n++)
        value = value << 8 | *from->at++;
    return value;
}

/* What follows the head of an object: `bytes` of content and `objects` in it. 0 when it is not whole. */
static int read_head(struct reader *from, uint64_t *bytes, uint64_t *objects) {
    static const unsigned char fixed[16] = {[0xa] = 4, [0xb] = 8, [0xc] = 1, [0xd] = 2, [0xe] = 4, [0xf] = 8};
    int good = 1;
    unsigned char head;
    *bytes = *objects = 0;
    if (from->at >= from->end)
        return 0;
    head = *from->at++;
    if (head < 0x80 || head >= 0xe0) /* small integers */
        return 1;
    if (head < 0x90)
        *objects = 2 * (uint64_t)(head & 0xf); /* fixmap */
    else if (head < 0xa0)
        *objects = head & 0xf; /* fixarray */
    else if (head < 0xc0)
        *bytes = head & 0x1f; /* fixstr */
    else if (head >= 0xc4 && head <= 0xc6)
        *bytes = read_number(from, (size_t)1 << (head - 0xc4), &good); /* bin */
    else if (head >= 0xc7 && head <= 0xc9)
        *bytes = 1 + read_number(from, (size_t)1 << (head - 0xc7), &good); /* ext */
    else if (head >= 0xca && head <= 0xcb)
        *bytes = fixed[head & 0xf]; /* floats */
    else if (head >= 0xcc && head <= 0xcf)
        *bytes = (uint64_t)1 << (head - 0xcc); /* unsigned integers */
    else if (head >= 0xd0 && head <= 0xd3)
        *bytes = (uint64_t)1 << (head - 0xd0); /* signed integers */
    else if (head >= 0xd4 && head <= 0xd8)
        *bytes = 1 + ((uint64_t)1 << (head - 0xd4)); /* fixext */
    else if (head >= 0xd9 && head <= 0xdb)
        *bytes = read_number(from, (size_t)1 << (head - 0xd9), &good); /* str */
    else if (head == 0xdc || head == 0xdd)
        *objects = read_number(from, head == 0xdc ? 2 : 4, &good); /* array */
    else if (head == 0xde || head == 0xdf)
        *objects = 2 * read_number(from, head == 0xde ? 2 : 4, &good); /* map */
    else if (head == 0xc1)
        return 0; /* never used; the others are nil and truth values */
    return good && *bytes <= left(from) && *objects <= left(from);
}

/* Go behind one object; 0 when it is not whole, or too deep. */
static int skip(struct reader *from) {
    uint64_t waiting[DEPTH_MAX], bytes, objects;
    int depth = 0;
    waiting[0] = 1;
    while (depth >= 0) {
        if (!waiting[depth]) {
            depth--;
            continue;
        }
        waiting[depth]--;
        if (!read_head(from, &bytes, &objects))
            return 0;
        from->at += bytes;
        if (objects) {
            if (++depth == DEPTH_MAX)
                return 0;
            waiting[depth] = objects;
        }
    }
    return 1;
}

size_t object_size(struct reader from) {
    const unsigned char *begin = from.at;
    return skip(&from) ? (size_t)(from.at - begin) : 0;
}

/* The number of elements of an array (`pairs` 0) or of pairs of a map (1). */
static int read_count(struct reader *from, int pairs, uint32_t *count) {
    static const unsigned char small[2] = {0x90, 0x80}, large[2] = {0xdc, 0xde};
    uint64_t bytes, objects;
    unsigned char head = from->at < from->end ? *from->at : 0xc1;
    if (!((head & 0xf0) == small[pairs] || (head | 1) == (large[pairs] | 1)) || !read_head(from, &bytes, &objects))
        return 0;
    *count = (uint32_t)(objects >> pairs);
    return 1;
}

int read_list(struct reader *list, uint32_t *count) { return read_count(list, 0, count); }

static int is_string(unsigned char head) {
    return (head >= 0xa0 && head < 0xc0) || (head >= 0xc4 && head <= 0xc6) || (head >= 0xd9 && head <= 0xdb);
}

static int read_string(struct reader *from, struct text *text) {
    uint64_t bytes, objects;
    unsigned char head = from->at < from->end ? *from->at : 0xc1;
    if (!is_string(head) || !read_head(from, &bytes, &objects))
        return 0;
    *text = (struct text){from->at, (size_t)bytes};
    from->at += bytes;
    return 1;
}

struct text next_string(struct reader *from) {
    struct text text = {from->at, 0};
    read_string(from, &text);
    return text;
}

static int read_integer(struct reader *from, int64_t *value) {
    int good = 1;
    uint64_t number;
    unsigned char head = from->at < from->end ? *from->at : 0xc1;
    if (head < 0x80) {
        *value = head;
        from->at++;
        return 1;
    }
    if (head < 0xcc || head > 0xcf)
        return 0; /* keys and attempts are not negative */
    from->at++;
    number = read_number(from, (size_t)1 << (head - 0xcc), &good);
    *value = (int64_t)number;
    return good && number <= INT64_MAX;
}

static int read_real(struct reader *from, double *value) {
    int good = 1;
    uint64_t bits;
    if (from->at >= from->end || *from->at++ != 0xcb)
        return 0;
    bits = read_number(from, 8, &good);
    memcpy(value, &bits, sizeof bits);
    return good;
}

static int contains(struct text text, unsigned char sign) { return text.size && memchr(text.at, sign, text.size) != 0; }

static int is_word(struct text text, const char *word) {
    return text.size == strlen(word) && memcmp(text.at, word, text.size) == 0;
}

/* A string that the system takes as an argument. */
static int read_argument(struct reader *from, struct text *text) {
    return read_string(from, text) && !contains(*text, 0);
}

static int read_path(struct reader *from, struct text *text, int may_be_empty) {
    return read_argument(from, text) && (text->size ? text->at[0] == '/' : may_be_empty);
}

static int read_arguments(struct reader *from, struct launch_record *record) {
    struct text text = {0, 0};
    int bare; /* the program is to be found on PATH */
    if (!read_count(from, 0, &record->argc) || !record->argc)
        return 0;
    record->argv = *from;
    for (uint32_t n = 0; n < record->argc; n++)
        if (!read_argument(from, &text) || (n == 0 && !text.size))
            return 0;
    struct reader first = record->argv;
    bare = !contains(next_string(&first), '/');
    if (!read_count(from, 1, &record->variables))
        return 0;
    record->env = *from;
    for (uint32_t n = 0; n < record->variables; n++) {
        if (!read_argument(from, &text) || !text.size || contains(text, '=') || (bare && is_word(text, "PATH")))
            return 0;
        if (!read_argument(from, &text))
            return 0;
    }
    return 1;
}

static int read_element(struct reader *from, struct element *element) {
    uint32_t fields;
    element->index = -1;
    if (from->at < from->end && *from->at == 0xc0) {
        from->at++;
        return 1;
    }
    return read_count(from, 0, &fields) && fields == ELEMENT_FIELDS && read_integer(from, &element->index)
        && read_integer(from, &element->place) && read_real(from, &element->origin);
}

enum record_kind read_record(const unsigned char *at, size_t size, struct launch_record *record) {
    struct reader from = {at, at + size};
    struct text text = {0, 0};
    uint32_t fields, files;
    if (!read_count(&from, 0, &fields) || !fields || !read_string(&from, &text))
        return OTHER_RECORD;
    if (is_word(text, "forget"))
        return FORGET_RECORD;
    if (is_word(text, "launch_run"))
        return LAUNCH_RUN;
    if (!is_word(text, "launch") || fields != LAUNCH_FIELDS)
        return OTHER_RECORD;
    if (!read_integer(&from, &record->key) || !read_argument(&from, &record->id)
        || !read_integer(&from, &record->attempt) || !record->attempt || !read_string(&from, &record->base)
        || !read_string(&from, &record->slot) || !read_arguments(&from, record) || !read_path(&from, &record->cwd, 0)
        || !read_path(&from, &record->stdin_path, 1) || !read_path(&from, &record->stdout_path, 1)
        || !read_path(&from, &record->stderr_path, 1))
        return OTHER_RECORD;
    /* suffix, after, script, whether the directory is to be made, files, element */
    if (!read_string(&from, &text) || text.size || !read_integer(&from, &record->after) || !read_string(&from, &text)
        || text.size || from.at >= from.end || *from.at++ != 0xc2 || !read_count(&from, 1, &files) || files
        || !read_element(&from, &record->element) || from.at != from.end)
        return OTHER_RECORD;
    return PLAIN_LAUNCH;
}

/* Whether there is a non-empty list of strings for each of so many elements, or for none. */
static int skip_own(struct reader *from, uint32_t lists, int64_t number) {
    struct text text;
    uint32_t strings;
    if (lists && lists != number)
        return 0;
    for (uint32_t n = 0; n < lists; n++) {
        if (!read_count(from, 0, &strings) || !strings)
            return 0;
        for (uint32_t k = 0; k < strings; k++)
            if (!read_string(from, &text))
                return 0;
    }
    return 1;
}

int read_run(const unsigned char *at, size_t size, struct run_record *run) {
    struct reader from = {at, at + size}, launch;
    struct text text = {0, 0};
    uint32_t fields, lists;
    if (!read_count(&from, 0, &fields) || fields != RUN_FIELDS || !read_string(&from, &text)
        || !read_integer(&from, &run->number) || !read_integer(&from, &run->step))
        return 0;
    launch = run->launch = from;
    if (!skip(&from) || !read_count(&launch, 0, &fields) || fields != LAUNCH_FIELDS || !read_count(&from, 0, &lists))
        return 0;
    run->own = from;
    if (!skip_own(&from, lists, run->number) || from.at != from.end)
        return 0;
    for (int field = 0; field < LAUNCH_FIELDS; field++) {
        int good = field == KEY_FIELD ? read_integer(&launch, &run->key)
            : field == AFTER_FIELD    ? read_integer(&launch, &run->after)
            : field == ELEMENT_FIELD  ? read_element(&launch, &run->element)
                                      : skip(&launch);
        if (!good)
            return 0;
    }
    return run->number > 0 && run->number <= RUN_MAX && run->key <= INT64_MAX - RUN_MAX && run->element.index >= 0
        && run->element.index <= INT64_MAX / 2 && run->step <= INT64_MAX / 2 / RUN_MAX;
}

static unsigned char *extend(struct buffer *to, size_t size) {
    unsigned char *place;
    if (to->room - to->size < size) {
        size_t room = 2 * to->room + size + 1024;
        unsigned char *bytes = to->failed ? NULL : realloc(to->at, room);
        if (!bytes) {
            to->failed = 1;
            return NULL;
        }
        to->at = bytes;
        to->room = room;
    }
    place = to->at + to->size;
    to->size += size;
    return place;
}

void put_raw(struct buffer *to, const void *at, size_t size) {
    unsigned char *place = extend(to, size);
    if (place && size)
        memcpy(place, at, size);
}

/* A head byte and a number of `size` bytes, most significant first. */
static void put_number(struct buffer *to, unsigned char head, uint64_t value, int size) {
    unsigned char bytes[9];
    bytes[0] = head;
    for (int n = size; n > 0; n--, value >>= 8)
        bytes[n] = (unsigned char)value;
    put_raw(to, bytes, (size_t)size + 1);
}

void put_list(struct buffer *to, unsigned count) { put_number(to, (unsigned char)(0x90 | count), 0, 0); }

void put_word(struct buffer *to, const char *word) {
    size_t size = strlen(word);
    put_number(to, (unsigned char)(0xa0 | size), 0, 0);
    put_raw(to, word, size);
}

void put_bytes(struct buffer *to, const void *at, size_t size) {
    if (size < 256)
        put_number(to, 0xc4, size, 1);
    else
        put_number(to, 0xc6, size, 4);
    put_raw(to, at, size);
}

void put_integer(struct buffer *to, int64_t value) {
    if (value >= 0 && value < 0x80)
        put_number(to, (unsigned char)value, 0, 0);
    else if (value < 0 || value > UINT32_MAX)
        put_number(to, 0xd3, (uint64_t)value, 8);
    else if (value > UINT16_MAX)
        put_number(to, 0xce, (uint64_t)value, 4);
    else if (value > UINT8_MAX)
        put_number(to, 0xcd, (uint64_t)value, 2);
    else
        put_number(to, 0xcc, (uint64_t)value, 1);
}

void put_real(struct buffer *to, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_number(to, 0xcb, bits, 8);
}

/* What an element has where the template has a mark: NUL and a letter, as in workers/protocol.py. */
struct fills {
    char index[24], number[12];
    struct text own[OWN_MARKS]; /* at NULL where it has none */
    struct reader argv;         /* behind these, `argc` strings */
    uint32_t argc;
};

static struct text text_of(const char *word) { return (struct text){(const unsigned char *)word, strlen(word)}; }

static struct text fill_of(const struct fills *fills, struct text rest) {
    const unsigned char letter = rest.size < 2 ? 0 : rest.at[1];
    if (letter >= 'A' && letter < 'A' + OWN_MARKS)
        return fills->own[letter - 'A'];
    return letter == 'i' ? text_of(fills->index) : letter == 'n' ? text_of(fills->number) : (struct text){NULL, 0};
}

/* A string with its marks filled in; `head` says of which type it was. */
static int put_filled(struct buffer *to, unsigned char head, struct text text, const struct fills *fills) {
    size_t size = 0;
    /* First the size, then the bytes. */
    for (int writes = 0; writes < 2; writes++) {
        struct text rest = text;
        if (writes && head >= 0xc4 && head <= 0xc6)
            put_number(to, 0xc6, size, 4);
        else if (writes)
            put_number(to, 0xdb, size, 4);
        while (rest.size) {
            const unsigned char *mark = memchr(rest.at, 0, rest.size);
            size_t before = mark ? (size_t)(mark - rest.at) : rest.size;
            struct text fill;
            if (writes)
                put_raw(to, rest.at, before);
            size += before;
            rest.at += before;
            rest.size -= before;
            if (!mark)
                break;
            fill = fill_of(fills, rest);
            if (!fill.at)
                return 0;
            if (writes)
                put_raw(to, fill.at, fill.size);
            size += fill.size;
            rest.at += 2;
            rest.size -= 2;
        }
    }
    return 1;
}

/* Copy one object, with the marks in its strings filled in. */
static int copy_filled(struct buffer *to, struct reader *from, const struct fills *fills) {
    uint64_t bytes, objects;
    for (uint64_t waiting = 1; waiting; waiting--) {
        const unsigned char *begin = from->at;
        struct text text;
        if (begin < from->end && is_string(*begin)) {
            if (!read_string(from, &text))
                return 0;
            if (!contains(text, 0))
                put_raw(to, begin, (size_t)(from->at - begin));
            else if (!put_filled(to, *begin, text, fills))
                return 0;
            continue;
        }
        if (!read_head(from, &bytes, &objects))
            return 0;
        from->at += bytes;
        put_raw(to, begin, (size_t)(from->at - begin));
        waiting += objects;
    }
    return 1;
}

/* The strings of the next element that has some of its own. */
static void take_own(struct run_record *run, struct fills *fills) {
    uint32_t strings;
    if (run->own.at == run->own.end || !read_count(&run->own, 0, &strings))
        return;
    for (uint32_t n = 0; n < strings; n++) {
        if (n == OWN_MARKS)
            fills->argv = run->own;
        struct text text = next_string(&run->own);
        if (n < OWN_MARKS)
            fills->own[n] = text;
    }
    fills->argv.end = run->own.at;
    fills->argc = strings > OWN_MARKS ? strings - OWN_MARKS : 0;
}

/* Its arguments: those of the template, or, where that has none, its own. */
static int put_arguments(struct buffer *to, struct reader *from, const struct fills *fills) {
    struct reader arguments = *from;
    uint32_t count;
    if (!fills->argc || !read_count(&arguments, 0, &count) || count)
        return copy_filled(to, from, fills);
    *from = arguments;
    put_number(to, 0xdd, fills->argc, 4);
    put_raw(to, fills->argv.at, left(&fills->argv));
    return 1;
}

int put_element(struct buffer *to, struct run_record *run, int64_t number) {
    struct reader from = run->launch;
    const int64_t index = run->element.index + number * run->step;
    struct fills fills;
    uint32_t fields;
    memset(&fills, 0, sizeof fills);
    take_own(run, &fills);
    snprintf(fills.index, sizeof fills.index, "%lld", (long long)index);
    snprintf(fills.number, sizeof fills.number, "%08x", (unsigned)(run->key + number));
    put_number(to, 0xdc, LAUNCH_FIELDS, 2);
    if (!read_count(&from, 0, &fields))
        return 0;
    for (int field = 0; field < LAUNCH_FIELDS; field++) {
        if (field != KEY_FIELD && field != AFTER_FIELD && field != ELEMENT_FIELD) {
            if (field == ARGV_FIELD ? !put_arguments(to, &from, &fills) : !copy_filled(to, &from, &fills))
                return 0;
            continue;
        }
        if (!skip(&from))
            return 0;
        if (field == KEY_FIELD)
            put_integer(to, run->key + number);
        else if (field == AFTER_FIELD)
            put_integer(to, number ? run->key + number - 1 : run->after);
        else {
            put_list(to, ELEMENT_FIELDS);
            put_integer(to, index);
            put_integer(to, run->element.place);
            put_real(to, run->element.origin);
        }
    }
    return !to->failed;
}
