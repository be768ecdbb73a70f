/* The module _native: starts and reaps plain launches for workers/launcher/launcher.py, from message to report.
 *
 * `Core.run` is the launcher's loop as long as only such launches are concerned. Whatever else there is to do it hands
 * over to its caller: messages, ends of other children, and whole chains with the launch that runs.
 * docs/design/0011-native-launcher.md says what a plain launch is, and when a chain is handed over.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "child.h"
#include "launch.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    BUCKETS = 1024,        /* of the table of keys */
    READ_BYTES = 1 << 16,  /* at a time, of the pipe */
    SIGNALS_MAX = 65,
    EVENTS_MAX = 16,
    ENDS_MAX = 256,        /* that are waited for at a time */
    SCAN_MAX = 1000,       /* so many process numbers are tried one by one */
    INLINE_BYTES = 4096,   /* captured output up to this size travels in the message, as in workers/protocol.py */
    WAKE_REPORTS = 64,     /* so many wake the reader at once, as in report_pipe.py */
    PROGRAMS_MAX = 64,
};
static const double ANNOUNCE_S = 0.02; /* as in launcher.py: what lives longer is handed over */
static const double PROGRAM_CACHE_S = 1.0; /* as in spawn.py */
static const double WAKE_DELAY_S = 0.010; /* as in report_pipe.py */

/* -- contexts ----------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *owner;     /* the caller's LaunchContext */
    PyObject *variables; /* a list that owns the strings of `shared` */
    PyObject *cpus;
    struct variables shared;
    struct limit *limits;
    size_t limit_count;
    mode_t umask;
    const char *path; /* the value of PATH in `shared`; NULL without one */
} Context;

static void context_free(PyObject *object) {
    Context *self = (Context *)object;
    PyTypeObject *type = Py_TYPE(object);
    Py_XDECREF(self->owner);
    Py_XDECREF(self->variables);
    Py_XDECREF(self->cpus);
    PyMem_Free(self->shared.at);
    PyMem_Free(self->limits);
    type->tp_free(object);
    Py_DECREF(type);
}

static int context_set_variables(Context *self) {
    Py_ssize_t count = PyList_GET_SIZE(self->variables);
    self->shared.at = PyMem_Calloc((size_t)count + 1, sizeof(char *));
    if (!self->shared.at) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t n = 0; n < count; n++) {
        char *variable;
        if (PyBytes_AsStringAndSize(PyList_GET_ITEM(self->variables, n), &variable, NULL) < 0)
            return -1;
        if (!strchr(variable, '=')) {
            PyErr_SetString(PyExc_ValueError, "a variable has no '='");
            return -1;
        }
        if (strncmp(variable, "PATH=", 5) == 0)
            self->path = variable + 5;
        self->shared.at[n] = variable;
    }
    self->shared.count = (size_t)count;
    return 0;
}

static int context_set_limits(Context *self, PyObject *limits) {
    Py_ssize_t count = PyList_GET_SIZE(limits);
    self->limits = PyMem_Calloc((size_t)count + 1, sizeof *self->limits);
    if (!self->limits) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t n = 0; n < count; n++) {
        long long soft, hard;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(limits, n), "iLL", &self->limits[n].number, &soft, &hard))
            return -1;
        self->limits[n].value = (struct rlimit){(rlim_t)soft, (rlim_t)hard};
    }
    self->limit_count = (size_t)count;
    return 0;
}

static PyObject *context_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"owner", "variables", "cpus", "umask", "limits", NULL};
    PyObject *owner, *variables, *cpus, *limits;
    unsigned int umask;
    Context *self;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OO!O!IO!", names, &owner, &PyList_Type, &variables,
            &PyBytes_Type, &cpus, &umask, &PyList_Type, &limits))
        return NULL;
    self = (Context *)type->tp_alloc(type, 0);
    if (!self)
        return NULL;
    self->owner = Py_NewRef(owner);
    self->variables = PyList_GetSlice(variables, 0, PyList_GET_SIZE(variables)); /* nobody else changes it */
    self->cpus = Py_NewRef(cpus);
    self->umask = (mode_t)umask;
    if (!self->variables || PyList_Sort(self->variables) < 0 || context_set_variables(self) < 0
        || context_set_limits(self, limits) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static PyType_Slot context_slots[] = {
    {Py_tp_doc, "What the launches of one base and slot inherit, for `Core.add_context`."},
    {Py_tp_new, context_new},
    {Py_tp_dealloc, context_free},
    {0, NULL},
};
static PyType_Spec context_spec = {
    .name = "pilotq.workers.launcher._native.Context",
    .basicsize = sizeof(Context),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = context_slots,
};

/* -- the native part ---------------------------------------------------------------------------------------------- */

/* A program that was found on PATH. */
struct program {
    char *name, *path, *file;
    double until; /* monotonic: a newer one may stand in front then */
};

/* A child that has ended. */
struct end {
    pid_t pid;
    int status;
    struct rusage usage;
    struct launch *launch; /* NULL: it is none of ours */
};

typedef struct {
    PyObject_HEAD
    int down, up, wake, poll, children, null, last_pid;
    PyObject *chains; /* the caller's, by key */
    PyObject *mains;  /* number of each main process -> key, of the caller's and ours */
    PyObject *cpus;   /* of this process, as of sched_setaffinity */
    PyObject *take;    /* a file for one stream */
    PyObject *release; /* ... that no launch uses any more */
    PyObject *hit;    /* failpoints; NULL where there are none */
    PyTypeObject *context_type;
    PyObject *contexts; /* base, NUL, slot -> Context */
    struct program programs[PROGRAMS_MAX];
    int ignored[SIGNALS_MAX];
    struct buffer in, out; /* `out` has room for the head of its frame at its begin */
    struct buffer element; /* the message of one of a run */
    struct buffer row;     /* ... and of its end, the line of the journal */
    uint32_t reports;      /* in `out` */
    struct launch *buckets[BUCKETS], *oldest, *newest;
    struct chain *startable, *startable_last;
    int unseen;           /* reports since the reader was woken */
    double wake_at;
    /* what `run` returns */
    PyObject *messages, *ends, *taken, *ready, *unsent;
    int closed;
} Core;

static double now(clockid_t clock) {
    struct timespec at;
    clock_gettime(clock, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

static int hit(Core *self, const char *point) {
    PyObject *result;
    if (!self->hit)
        return 0;
    result = PyObject_CallFunction(self->hit, "s", point);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* Append to a list that is made when it is needed; takes the reference. */
static int append(PyObject **list, PyObject *item) {
    int result = -1;
    if (item && (*list || (*list = PyList_New(0))))
        result = PyList_Append(*list, item);
    Py_XDECREF(item);
    return result;
}

/* -- launches and chains ------------------------------------------------------------------------------------------ */

static struct launch **bucket(Core *self, int64_t key) { return &self->buckets[(uint64_t)key % BUCKETS]; }

static struct launch *find(Core *self, int64_t key) {
    struct launch *launch = *bucket(self, key);
    while (launch && launch->key != key)
        launch = launch->same_bucket;
    return launch;
}

static void add_to_table(Core *self, struct launch *launch) {
    struct launch **place = bucket(self, launch->key);
    launch->same_bucket = *place;
    *place = launch;
}

static void free_launch(Core *self, struct launch *launch) {
    struct launch **place = bucket(self, launch->key);
    while (*place && *place != launch)
        place = &(*place)->same_bucket;
    if (*place)
        *place = launch->same_bucket;
    Py_XDECREF((PyObject *)launch->context);
    Py_XDECREF((PyObject *)launch->files[0]);
    Py_XDECREF((PyObject *)launch->files[1]);
    free(launch);
}

static void append_to_chain(struct chain *chain, struct launch *launch) {
    launch->chain = chain;
    if (chain->last)
        chain->last->next = launch;
    else
        chain->first = launch;
    chain->last = launch;
}

static void set_startable(Core *self, struct chain *chain) {
    chain->next = NULL;
    if (self->startable_last)
        self->startable_last->next = chain;
    else
        self->startable = chain;
    self->startable_last = chain;
}

static void unset_startable(Core *self, struct chain *chain) {
    struct chain **place = &self->startable, *last = NULL;
    while (*place && *place != chain) {
        last = *place;
        place = &last->next;
    }
    if (*place) {
        *place = chain->next;
        if (self->startable_last == chain)
            self->startable_last = last;
    }
}

static void add_running(Core *self, struct launch *launch) {
    launch->older = self->newest;
    launch->newer = NULL;
    if (self->newest)
        self->newest->newer = launch;
    else
        self->oldest = launch;
    self->newest = launch;
    launch->chain->running = launch;
}

static void remove_running(Core *self, struct launch *launch) {
    *(launch->older ? &launch->older->newer : &self->oldest) = launch->newer;
    *(launch->newer ? &launch->newer->older : &self->newest) = launch->older;
    launch->chain->running = NULL;
}

/* Put the files of a launch back among the free ones. */
static int release_files(Core *self, struct launch *launch) {
    for (int n = 0; n < 2; n++) {
        PyObject *file = launch->files[n], *done;
        if (!file)
            continue;
        launch->files[n] = NULL;
        done = PyObject_CallOneArg(self->release, file);
        Py_DECREF(file);
        if (!done)
            return -1;
        Py_DECREF(done);
    }
    return 0;
}

static PyObject *described(struct launch *launch) {
    return Py_BuildValue("y#O", launch->message, (Py_ssize_t)launch->message_size,
        ((Context *)launch->context)->owner);
}

static double cpu_seconds(const struct rusage *usage) {
    return (double)(usage->ru_utime.tv_sec + usage->ru_stime.tv_sec)
        + 1e-6 * (double)(usage->ru_utime.tv_usec + usage->ru_stime.tv_usec);
}

/* As ChildEnd of plain_launches.py. */
static PyObject *described_end(const struct end *end) {
    const struct rusage *usage = &end->usage;
    return Py_BuildValue("iidll", end->pid, end->status, cpu_seconds(usage), usage->ru_maxrss,
        usage->ru_minflt + usage->ru_majflt);
}

/* Hand a chain over to the caller: what waits in it, the launch that runs, and how that has ended if it has. */
static int hand_over(Core *self, struct chain *chain, const struct end *end) {
    struct launch *running = chain->running, *launch, *next;
    PyObject *waiting = PyList_New(0), *head = Py_NewRef(Py_None), *exited = Py_NewRef(Py_None);
    int failed = !waiting;
    if (running) {
        remove_running(self, running);
        Py_SETREF(head, Py_BuildValue("NiOOddd", described(running), running->pid,
            running->files[0] ? (PyObject *)running->files[0] : Py_None,
            running->files[1] ? (PyObject *)running->files[1] : Py_None, running->began, running->running_since,
            running->started));
        free_launch(self, running);
    } else
        unset_startable(self, chain);
    if (end)
        Py_SETREF(exited, described_end(end));
    for (launch = chain->first; launch; launch = next) {
        next = launch->next;
        failed |= !waiting || append(&waiting, described(launch)) < 0;
        free_launch(self, launch);
    }
    free(chain);
    if (failed || !head || !exited) {
        Py_XDECREF(waiting);
        Py_XDECREF(head);
        Py_XDECREF(exited);
        return -1;
    }
    return append(&self->taken, Py_BuildValue("NNN", waiting, head, exited));
}

/* -- reports ------------------------------------------------------------------------------------------------------ */

/* A frame's head is its size, little endian, then the list's: both are written when it is sent. */
enum { FRAME_HEAD = 9 };

static struct buffer *new_report(Core *self, unsigned fields, const char *tag, int64_t key) {
    static const unsigned char head[FRAME_HEAD] = {[4] = 0xdd};
    if (!self->reports)
        put_raw(&self->out, head, FRAME_HEAD);
    self->reports++;
    put_list(&self->out, fields);
    put_word(&self->out, tag);
    put_integer(&self->out, key);
    return &self->out;
}

static void put_captured(struct buffer *to, const void *data, size_t size) {
    put_list(to, 5);
    put_bytes(to, data, size);
    put_bytes(to, "", 0);
    put_integer(to, 0);
    put_integer(to, (int64_t)size);
    put_bytes(to, "", 0);
}

/* Write the reports; what the pipe does not take is the caller's, who has it written later. */
static int send_reports(Core *self) {
    size_t size = self->out.size;
    ssize_t done;
    if (self->out.failed) {
        PyErr_NoMemory();
        return -1;
    }
    if (!self->reports || self->unsent)
        return 0;
    for (int n = 0; n < 4; n++) {
        self->out.at[n] = (unsigned char)((size - 4) >> 8 * n);
        self->out.at[5 + n] = (unsigned char)(self->reports >> 8 * (3 - n));
    }
    done = write(self->up, self->out.at, size);
    if (done < 0)
        done = 0; /* full, or nobody reads any more: the caller finds out */
    if ((size_t)done < size) {
        self->unsent = PyBytes_FromStringAndSize((char *)self->out.at + done, (Py_ssize_t)size - done);
        if (!self->unsent)
            return -1;
    }
    self->out.size = 0;
    self->reports = 0;
    return 0;
}

static void wake_reader(Core *self, int at_once, double at) {
    if (!self->unseen)
        self->wake_at = at + WAKE_DELAY_S;
    self->unseen += at_once ? WAKE_REPORTS : 1;
}

/* -- starting ----------------------------------------------------------------------------------------------------- */

/* Look for a program in the folders of PATH; NULL when it is in none, or a folder depends on the directory. */
static char *search(const char *name, const char *path) {
    char *file = malloc(strlen(path) + strlen(name) + 2);
    while (file && *path) {
        size_t size = strcspn(path, ":");
        struct stat status;
        if (*path != '/')
            break;
        sprintf(file, "%.*s/%s", (int)size, path, name);
        if (stat(file, &status) == 0 && S_ISREG(status.st_mode) && access(file, X_OK) == 0)
            return file;
        path += size + (path[size] == ':');
    }
    free(file);
    return NULL;
}

static void forget_program(struct program *program) {
    free(program->name);
    free(program->path);
    free(program->file);
    memset(program, 0, sizeof *program);
}

/* The file of a launch's program; NULL when it is not found, or the caller must look for it. */
static const char *find_program(Core *self, const struct launch *launch, double at) {
    const char *name = launch->argv[0], *path = ((Context *)launch->context)->path;
    struct program *place = &self->programs[0];
    if (strchr(name, '/'))
        return name;
    if (!path)
        return NULL;
    for (int n = 0; n < PROGRAMS_MAX; n++) {
        struct program *one = &self->programs[n];
        if (one->file && strcmp(one->name, name) == 0 && strcmp(one->path, path) == 0) {
            if (at < one->until)
                return one->file;
            place = one;
            break;
        }
        if (one->until < place->until) /* the one that was found longest ago */
            place = one;
    }
    forget_program(place);
    *place = (struct program){strdup(name), strdup(path), search(name, path), at + PROGRAM_CACHE_S};
    if (!place->name || !place->path || !place->file)
        forget_program(place);
    return place->file;
}

/* Get the files that capture its output. -1 with no exception set when none can be made. */
static int take_files(Core *self, struct launch *launch) {
    for (int n = 0; n < 2; n++) {
        PyObject *file, *number;
        if (*(n ? launch->stderr_path : launch->stdout_path))
            continue;
        file = PyObject_CallNoArgs(self->take);
        if (!file) {
            if (PyErr_ExceptionMatches(PyExc_OSError))
                PyErr_Clear();
            return -1;
        }
        launch->files[n] = file;
        number = PyObject_GetAttrString(file, "fd");
        launch->fds[n] = number ? (int)PyLong_AsLong(number) : -1;
        Py_XDECREF(number);
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}

static pid_t start_process(Core *self, const struct launch *launch, const char *program) {
    const Context *context = (Context *)launch->context;
    struct child child = {
        .program = program, .cwd = launch->cwd, .stdin_path = launch->stdin_path, .stdout_path = launch->stdout_path,
        .stderr_path = launch->stderr_path, .argv = (char *const *)launch->argv, .envp = (char *const *)launch->envp,
        .files = {self->null, launch->fds[0], launch->fds[1]},
        .cpus = (unsigned char *)PyBytes_AS_STRING(context->cpus), .cpus_size = (size_t)PyBytes_GET_SIZE(context->cpus),
        .own_cpus = (unsigned char *)PyBytes_AS_STRING(self->cpus), .own_cpus_size = (size_t)PyBytes_GET_SIZE(self->cpus),
        .umask = context->umask, .limits = context->limits, .limit_count = context->limit_count,
        .ignored = self->ignored,
    };
    return start_child(&child);
}

/* Tell the caller's ProcessTracker of a main process, or that it is none any more. */
static int set_main(Core *self, pid_t pid, int64_t key) {
    PyObject *number = PyLong_FromLong(pid), *value = PyLong_FromLongLong(key);
    int result = number && value ? PyDict_SetItem(self->mains, number, value) : -1;
    Py_XDECREF(number);
    Py_XDECREF(value);
    return result;
}

static int unset_main(Core *self, pid_t pid) {
    PyObject *number = PyLong_FromLong(pid);
    int result = number ? PyDict_DelItem(self->mains, number) : -1;
    Py_XDECREF(number);
    return result;
}

/* Start the first launch of a chain, or hand the chain over. 0 when the pipe must take reports first. */
static int start_next(Core *self, struct chain *chain) {
    struct launch *launch = chain->first;
    double began = now(CLOCK_MONOTONIC);
    const char *program = find_program(self, launch, began);
    if (!program || take_files(self, launch) < 0) {
        if (PyErr_Occurred() || release_files(self, launch) < 0)
            return -1;
        return hand_over(self, chain, NULL) < 0 ? -1 : 1;
    }
    new_report(self, 2, "begun", launch->key);
    if (send_reports(self) < 0)
        return -1;
    if (self->unsent) /* else the reader of the pipe could not know of it after our death */
        return release_files(self, launch) < 0 ? -1 : 0;
    if (hit(self, "begun sent") < 0)
        return -1;
    launch->began = began;
    launch->pid = start_process(self, launch, program);
    if (launch->pid < 0) {
        if (release_files(self, launch) < 0)
            return -1;
        return hand_over(self, chain, NULL) < 0 ? -1 : 1;
    }
    unset_startable(self, chain);
    chain->first = launch->next;
    if (!chain->first)
        chain->last = NULL;
    launch->next = NULL;
    launch->running_since = now(CLOCK_MONOTONIC);
    launch->started = now(CLOCK_REALTIME);
    add_running(self, launch);
    if (hit(self, "spawned") < 0 || set_main(self, launch->pid, launch->key) < 0 || hit(self, "tracked") < 0)
        return -1;
    return 1;
}

/* -- messages ----------------------------------------------------------------------------------------------------- */

static int pass_on(Core *self, const unsigned char *at, size_t size) {
    return append(&self->messages, PyBytes_FromStringAndSize((const char *)at, (Py_ssize_t)size));
}

static Context *find_context(Core *self, const struct launch_record *record) {
    PyObject *context, *name = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(record->base.size + 1 + record->slot.size));
    char *at;
    if (!name)
        return NULL;
    at = PyBytes_AS_STRING(name);
    memcpy(at, record->base.at, record->base.size);
    at[record->base.size] = 0;
    memcpy(at + record->base.size + 1, record->slot.at, record->slot.size);
    context = PyDict_GetItemWithError(self->contexts, name);
    Py_DECREF(name);
    return (Context *)context;
}

/* The launch of a message that is ours; NULL with or without an exception. */
static struct launch *new_launch(
    Core *self, const struct launch_record *record, const unsigned char *at, size_t size, PyObject *owner) {
    Context *context = find_context(self, record);
    struct launch *launch;
    if (!context || (owner && context->owner != owner))
        return NULL;
    launch = make_launch(record, at, size, &context->shared);
    if (!launch) {
        PyErr_NoMemory();
        return NULL;
    }
    launch->context = Py_NewRef((PyObject *)context);
    return launch;
}

static struct chain *new_chain(Core *self) {
    struct chain *chain = calloc(1, sizeof *chain);
    if (chain)
        set_startable(self, chain);
    else
        PyErr_NoMemory();
    return chain;
}

/* Whether a launch that is chained behind that key goes to the caller; -1 with an exception. */
static int is_the_callers(Core *self, int64_t after) {
    PyObject *number;
    int found;
    if (!after)
        return 0;
    if (self->messages || self->taken)
        return 1; /* perhaps that one is among them */
    number = PyLong_FromLongLong(after);
    found = number ? PyDict_Contains(self->chains, number) : -1;
    Py_XDECREF(number);
    return found;
}

static int receive_run(Core *self, const unsigned char *at, size_t size);

static int receive_record(Core *self, const unsigned char *at, size_t size) {
    struct launch_record record;
    enum record_kind kind = read_record(at, size, &record);
    struct launch *launch = NULL, *before;
    struct chain *chain;
    if (kind == LAUNCH_RUN)
        return receive_run(self, at, size);
    if (kind == FORGET_RECORD)
        PyDict_Clear(self->contexts);
    if (kind == PLAIN_LAUNCH) {
        int theirs;
        before = record.after ? find(self, record.after) : NULL;
        theirs = before ? 0 : is_the_callers(self, record.after);
        if (theirs < 0 || (!theirs && !(launch = new_launch(self, &record, at, size, NULL)) && PyErr_Occurred()))
            return -1;
    } else
        before = NULL;
    if (!launch) {
        /* What is chained behind a launch of ours takes that one's chain with it. */
        return pass_on(self, at, size);
    }
    if (hit(self, "launch received") < 0 || !(chain = before ? before->chain : new_chain(self))) {
        add_to_table(self, launch);
        free_launch(self, launch);
        return -1;
    }
    add_to_table(self, launch);
    append_to_chain(chain, launch);
    return 0;
}

/* The elements of a run, each as if its launch had come by itself. */
static int receive_run(Core *self, const unsigned char *at, size_t size) {
    struct run_record run;
    if (!read_run(at, size, &run))
        return pass_on(self, at, size);
    for (int64_t number = 0; number < run.number; number++) {
        self->element.size = 0;
        if (!put_element(&self->element, &run, number)) {
            if (!self->element.failed && !number)
                return pass_on(self, at, size);
            PyErr_NoMemory();
            return -1;
        }
        if (receive_record(self, self->element.at, self->element.size) < 0)
            return -1;
    }
    return 0;
}

/* Take whole frames out of what was read. */
static int receive_frames(Core *self) {
    const unsigned char *at = self->in.at, *end = at + self->in.size;
    while (end - at >= 4) {
        size_t size = at[0] | (size_t)at[1] << 8 | (size_t)at[2] << 16 | (size_t)at[3] << 24;
        struct reader list = {at + 4, at + 4 + size};
        uint32_t count;
        if ((size_t)(end - at) - 4 < size)
            break;
        if (!read_list(&list, &count)) {
            PyErr_SetString(PyExc_ValueError, "a frame holds no list");
            return -1;
        }
        for (; count; count--) {
            size_t one = object_size(list);
            if (!one) {
                PyErr_SetString(PyExc_ValueError, "a frame holds no whole message");
                return -1;
            }
            if (receive_record(self, list.at, one) < 0)
                return -1;
            list.at += one;
        }
        at += 4 + size;
    }
    memmove(self->in.at, at, (size_t)(end - at));
    self->in.size = (size_t)(end - at);
    return 0;
}

static int receive(Core *self) {
    unsigned char data[READ_BYTES];
    ssize_t size = read(self->down, data, sizeof data);
    if (size < 0) {
        if (errno == EINTR || errno == EAGAIN)
            return 0;
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    if (!size)
        self->closed = 1;
    put_raw(&self->in, data, (size_t)size);
    if (self->in.failed) {
        PyErr_NoMemory();
        return -1;
    }
    return receive_frames(self);
}

/* -- ends --------------------------------------------------------------------------------------------------------- */

/* The number that was given to a process last, of whatever user; 0 when that cannot be read. */
static pid_t last_pid(Core *self) {
    char text[128], *at;
    ssize_t size = pread(self->last_pid, text, sizeof text - 1, 0);
    if (size <= 0)
        return 0;
    text[size] = 0;
    at = strrchr(text, ' ');
    return at ? (pid_t)atol(at) : 0;
}

/* Whether no process of a launch that has ended is left: none in its group, and no orphan that may be of it. 0 also when
 * that takes longer to find out. */
static int left_nothing(Core *self, const struct launch *launch) {
    pid_t last;
    if (kill(-launch->pid, 0) == 0 || errno != ESRCH)
        return 0;
    last = last_pid(self);
    if (last < launch->pid || last - launch->pid > SCAN_MAX)
        return 0;
    for (pid_t pid = launch->pid + 1; pid <= last; pid++) {
        siginfo_t info = {.si_pid = 0};
        PyObject *number;
        int known;
        if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) < 0)
            continue; /* no child of ours; one that has just ended may have left another, with a number behind the last */
        number = PyLong_FromLong(pid);
        known = number ? PyDict_Contains(self->mains, number) : -1;
        Py_XDECREF(number);
        if (known < 0)
            PyErr_Clear();
        if (known <= 0)
            return 0;
    }
    return 1;
}

/* Put what was captured into a report, and empty the file; 0 when the caller must do it. */
static int read_captured(const struct launch *launch, unsigned char data[2][INLINE_BYTES], size_t sizes[2]) {
    for (int n = 0; n < 2; n++) {
        off_t size = launch->files[n] ? lseek(launch->fds[n], 0, SEEK_END) : 0;
        if (size < 0 || size > INLINE_BYTES)
            return 0;
        sizes[n] = (size_t)size;
        if (size && pread(launch->fds[n], data[n], sizes[n], 0) != (ssize_t)size)
            return 0;
    }
    for (int n = 0; n < 2; n++)
        /* Appending ignores the position, but the next task could see it. */
        if (sizes[n] && (ftruncate(launch->fds[n], 0) < 0 || lseek(launch->fds[n], 0, SEEK_SET) < 0))
            return 0;
    return 1;
}

/* As `_peak` of launcher.py. */
static int64_t peak(const struct rusage *usage) {
    static long fault_bytes;
    static struct rusage own; /* its peak never falls */
    int64_t bytes = (int64_t)usage->ru_maxrss * 1024, faults;
    if (usage->ru_maxrss > own.ru_maxrss)
        getrusage(RUSAGE_SELF, &own);
    if (usage->ru_maxrss > own.ru_maxrss)
        return bytes;
    if (!fault_bytes)
        fault_bytes = 16 * sysconf(_SC_PAGESIZE);
    faults = (int64_t)(usage->ru_minflt + usage->ru_majflt) * fault_bytes;
    return faults < bytes ? faults : bytes;
}

static void report_end(Core *self, const struct launch *launch, const struct end *end, double at,
    unsigned char data[2][INLINE_BYTES], const size_t sizes[2]) {
    struct buffer *to = new_report(self, 12, "exited", launch->key);
    const struct rusage *usage = &end->usage;
    put_integer(to, launch->pid);
    put_integer(to, end->status);
    put_real(to, launch->started);
    put_real(to, now(CLOCK_REALTIME));
    put_real(to, at - launch->running_since);
    put_real(to, cpu_seconds(usage));
    put_integer(to, peak(usage));
    put_integer(to, 0);
    put_captured(to, data[0], sizes[0]);
    put_captured(to, data[1], sizes[1]);
}

static int64_t microseconds(double seconds) { return (int64_t)(seconds * 1e6 + (seconds < 0 ? -0.5 : 0.5)); }

/* An element that has ended plainly: its line of the journal, as Row of broker/store/journal_runs.py. */
static void report_ran(Core *self, const struct launch *launch, const struct end *end, double at) {
    const double ended = now(CLOCK_REALTIME), lasted = ended - launch->started;
    struct buffer *to, *row = &self->row;
    row->size = 0;
    put_list(row, 7);
    put_integer(row, launch->element.index);
    put_integer(row, launch->element.place);
    put_integer(row, microseconds(launch->started - launch->element.origin));
    put_integer(row, microseconds(lasted > 0 ? lasted : 0));
    put_integer(row, launch->pid);
    put_integer(row, peak(&end->usage));
    put_integer(row, microseconds(cpu_seconds(&end->usage)));
    to = new_report(self, 5, "ran", launch->key);
    put_real(to, at - launch->running_since);
    put_real(to, ended);
    put_bytes(to, row->at, row->size);
    to->failed |= row->failed;
}

/* A launch of ours has ended: report it, and let its chain go on; or hand the chain over. */
static int complete(Core *self, const struct end *end) {
    struct launch *launch = end->launch;
    struct chain *chain = launch->chain;
    unsigned char data[2][INLINE_BYTES];
    size_t sizes[2];
    double at = now(CLOCK_MONOTONIC);
    if (hit(self, "reaped") < 0)
        return -1;
    if (!left_nothing(self, launch) || !read_captured(launch, data, sizes))
        return hand_over(self, chain, end);
    if (launch->element.index >= 0 && !end->status && !sizes[0] && !sizes[1])
        report_ran(self, launch, end, at);
    else
        report_end(self, launch, end, at, data, sizes);
    remove_running(self, launch);
    if (hit(self, "collected") < 0 || release_files(self, launch) < 0)
        return -1;
    free_launch(self, launch);
    wake_reader(self, !chain->first, at);
    if (chain->first)
        set_startable(self, chain);
    else
        free(chain);
    return hit(self, "reported");
}

/* Wait for all children that have ended, then report: a zombie that a main process leaves must not count as alive. */
static int reap(Core *self) {
    struct end ends[ENDS_MAX];
    char signals[128];
    int count;
    if (read(self->children, signals, sizeof signals) < 0)
        errno = 0; /* there was none: it costs nothing to look */
    do {
        for (count = 0; count < ENDS_MAX; count++) {
            struct end *end = &ends[count];
            end->pid = wait4(-1, &end->status, WNOHANG, &end->usage);
            if (end->pid <= 0)
                break;
            end->launch = self->oldest;
            while (end->launch && end->launch->pid != end->pid)
                end->launch = end->launch->newer;
            if (end->launch && unset_main(self, end->pid) < 0)
                return -1;
        }
        for (int n = 0; n < count; n++) {
            if (ends[n].launch ? complete(self, &ends[n]) < 0 : append(&self->ends, described_end(&ends[n])) < 0)
                return -1;
        }
    } while (count == ENDS_MAX);
    return 0;
}

/* -- the loop ----------------------------------------------------------------------------------------------------- */

/* Milliseconds, rounded up, until the caller's moment or one of ours; -1: for ever. */
static int pause_ms(Core *self, double until, int may_start) {
    double moment = until;
    if (may_start && (self->startable || self->reports))
        return 0;
    if (self->oldest && (moment < 0 || self->oldest->running_since + ANNOUNCE_S < moment))
        moment = self->oldest->running_since + ANNOUNCE_S;
    if (self->unseen && !self->reports && (moment < 0 || self->wake_at < moment))
        moment = self->wake_at;
    if (moment < 0)
        return -1;
    moment -= now(CLOCK_MONOTONIC);
    return moment <= 0 ? 0 : moment > 3600 ? 3600 * 1000 : (int)(1000 * moment) + 1;
}

static int serve_events(Core *self, int timeout) {
    struct epoll_event events[EVENTS_MAX];
    int count;
    Py_BEGIN_ALLOW_THREADS
    count = epoll_wait(self->poll, events, EVENTS_MAX, timeout);
    Py_END_ALLOW_THREADS
    if (count < 0)
        return errno == EINTR ? PyErr_CheckSignals() : (PyErr_SetFromErrno(PyExc_OSError), -1);
    for (int n = 0; n < count; n++) {
        int fd = events[n].data.fd, result;
        if (fd == self->down)
            result = receive(self);
        else if (fd == self->children)
            result = reap(self);
        else
            result = append(&self->ready, PyLong_FromLong(fd));
        if (result < 0)
            return -1;
    }
    return 0;
}

/* One turn of the loop; 1 when there is something for the caller. */
static int turn(Core *self, double until, int may_start) {
    double at;
    int started = 1;
    if (serve_events(self, pause_ms(self, until, may_start)) < 0)
        return -1;
    at = now(CLOCK_MONOTONIC);
    while (self->oldest && at >= self->oldest->running_since + ANNOUNCE_S)
        if (hand_over(self, self->oldest->chain, NULL) < 0)
            return -1;
    /* The caller must have heard of an end before the number of that process can be given out again. */
    while (may_start && started && self->startable && !self->ends && !self->taken)
        if ((started = start_next(self, self->startable)) < 0)
            return -1;
    if (may_start && send_reports(self) < 0)
        return -1;
    if (self->unseen && !self->reports && (self->unseen >= WAKE_REPORTS || at >= self->wake_at)) {
        self->unseen = 0;
        if (write(self->wake, "!", 1) < 0)
            errno = 0; /* it is full of unread bytes, or its reader has ended: then the other pipes have closed, too */
    }
    return self->closed || self->messages || self->ends || self->taken || self->ready || self->unsent
        || (until >= 0 && at >= until);
}

/* The lists that were collected, which are then begun anew. */
static PyObject *collected(PyObject **list) {
    PyObject *result = *list ? *list : Py_NewRef(Py_None);
    *list = NULL;
    return result;
}

static PyObject *core_run(Core *self, PyObject *arguments) {
    double until;
    int may_start, done;
    if (!PyArg_ParseTuple(arguments, "dp", &until, &may_start))
        return NULL;
    while (!(done = turn(self, until, may_start)))
        ;
    if (done < 0)
        return NULL;
    return Py_BuildValue("NNNNNO", collected(&self->messages), collected(&self->ready), collected(&self->ends),
        collected(&self->taken), collected(&self->unsent), self->closed ? Py_True : Py_False);
}

/* The chain that a launch of ours is in, for a message that is not ours: handed over as `run` does. None without one. */
static PyObject *core_take(Core *self, PyObject *key) {
    long long number = PyLong_AsLongLong(key);
    struct launch *launch;
    if (number == -1 && PyErr_Occurred())
        PyErr_Clear(); /* no launch has such a key */
    launch = find(self, number);
    if (launch && hand_over(self, launch->chain, NULL) < 0)
        return NULL;
    return collected(&self->taken);
}

/* All chains of which a launch runs. */
static PyObject *core_take_running(Core *self, PyObject *Py_UNUSED(none)) {
    while (self->oldest)
        if (hand_over(self, self->oldest->chain, NULL) < 0)
            return NULL;
    return collected(&self->taken);
}

/* Take over a chain of the caller's, as pairs of a message and the owner of its context; False: it has a launch that is
 * not ours to start. */
static PyObject *core_adopt(Core *self, PyObject *items) {
    struct chain *chain;
    Py_ssize_t count = PyList_Check(items) ? PyList_GET_SIZE(items) : 0;
    if (!count)
        Py_RETURN_FALSE;
    chain = new_chain(self);
    if (!chain)
        return NULL;
    for (Py_ssize_t n = 0; n < count; n++) {
        struct launch_record record;
        struct launch *launch = NULL;
        PyObject *owner;
        const char *at;
        Py_ssize_t size;
        if (!PyArg_ParseTuple(PyList_GET_ITEM(items, n), "y#O", &at, &size, &owner))
            goto failure;
        if (read_record((const unsigned char *)at, (size_t)size, &record) == PLAIN_LAUNCH)
            launch = new_launch(self, &record, (const unsigned char *)at, (size_t)size, owner);
        if (!launch)
            goto failure;
        add_to_table(self, launch);
        append_to_chain(chain, launch);
    }
    Py_RETURN_TRUE;
failure:
    unset_startable(self, chain);
    for (struct launch *launch = chain->first, *next; launch; launch = next) {
        next = launch->next;
        free_launch(self, launch);
    }
    free(chain);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
}

static PyObject *core_add_context(Core *self, PyObject *arguments) {
    PyObject *name, *context;
    if (!PyArg_ParseTuple(arguments, "SO!", &name, self->context_type, &context)
        || PyDict_SetItem(self->contexts, name, context) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *core_forget_contexts(Core *self, PyObject *Py_UNUSED(none)) {
    PyDict_Clear(self->contexts);
    Py_RETURN_NONE;
}

static PyObject *core_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"down", "up", "wake", "poll", "children", "null", "cpus", "chains", "mains", "take", "release", "hit", NULL};
    Core *self = (Core *)type->tp_alloc(type, 0);
    PyObject *take, *release, *hit_point;
    int count = 0;
    if (!self)
        return NULL;
    self->last_pid = -1;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "iiiiiiSO!O!OOO", names, &self->down, &self->up, &self->wake,
            &self->poll, &self->children, &self->null, &self->cpus, &PyDict_Type, &self->chains, &PyDict_Type, &self->mains, &take,
            &release, &hit_point)) {
        self->cpus = self->chains = self->mains = NULL; /* they were borrowed */
        Py_DECREF(self);
        return NULL;
    }
    Py_INCREF(self->cpus);
    Py_INCREF(self->chains);
    Py_INCREF(self->mains);
    self->take = Py_NewRef(take);
    self->release = Py_NewRef(release);
    self->hit = hit_point == Py_None ? NULL : Py_NewRef(hit_point);
    self->context_type = (PyTypeObject *)Py_NewRef(*(PyObject **)PyType_GetModuleState(type));
    self->contexts = PyDict_New();
    self->last_pid = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    for (int number = 1; number < SIGNALS_MAX; number++) {
        struct sigaction action;
        if (sigaction(number, NULL, &action) == 0 && action.sa_handler == SIG_IGN && count < SIGNALS_MAX - 1)
            self->ignored[count++] = number;
    }
    if (!self->contexts) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void core_free(PyObject *object) {
    Core *self = (Core *)object;
    PyTypeObject *type = Py_TYPE(object);
    struct chain *chain, *next_chain;
    for (chain = self->startable; chain; chain = next_chain) {
        next_chain = chain->next;
        free(chain);
    }
    while (self->oldest) {
        struct launch *launch = self->oldest;
        chain = launch->chain;
        remove_running(self, launch);
        free(chain);
    }
    for (int n = 0; n < BUCKETS; n++)
        while (self->buckets[n])
            free_launch(self, self->buckets[n]);
    for (int n = 0; n < PROGRAMS_MAX; n++)
        forget_program(&self->programs[n]);
    if (self->last_pid >= 0)
        close(self->last_pid);
    free(self->in.at);
    free(self->out.at);
    free(self->element.at);
    free(self->row.at);
    Py_XDECREF(self->cpus);
    Py_XDECREF(self->chains);
    Py_XDECREF(self->mains);
    Py_XDECREF(self->take);
    Py_XDECREF(self->hit);
    Py_XDECREF((PyObject *)self->context_type);
    Py_XDECREF(self->contexts);
    Py_XDECREF(self->release);
    Py_XDECREF(self->messages);
    Py_XDECREF(self->ends);
    Py_XDECREF(self->taken);
    Py_XDECREF(self->ready);
    Py_XDECREF(self->unsent);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef core_methods[] = {
    {"run", (PyCFunction)core_run, METH_VARARGS,
        "run(until, may_start): serve until something is for the caller, or until that monotonic time (-1: for ever)."},
    {"take", (PyCFunction)core_take, METH_O, "take(key): the chain of that launch, as a list of one; None without one."},
    {"take_running", (PyCFunction)core_take_running, METH_NOARGS, "take_running(): all chains of which a launch runs."},
    {"adopt", (PyCFunction)core_adopt, METH_O, "adopt([(message, owner of its context)...]): whether it was taken over."},
    {"add_context", (PyCFunction)core_add_context, METH_VARARGS, "add_context(b'base\\0slot', Context(...))"},
    {"forget_contexts", (PyCFunction)core_forget_contexts, METH_NOARGS, "forget_contexts(): those that were added."},
    {NULL, NULL, 0, NULL},
};
static PyType_Slot core_slots[] = {
    {Py_tp_doc, "Starts and reaps plain launches."},
    {Py_tp_new, core_new},
    {Py_tp_dealloc, core_free},
    {Py_tp_methods, core_methods},
    {0, NULL},
};
static PyType_Spec core_spec = {
    .name = "pilotq.workers.launcher._native.Core",
    .basicsize = sizeof(Core),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = core_slots,
};

/* -- the module --------------------------------------------------------------------------------------------------- */

static int add_types(PyObject *module) {
    PyObject **context_type = PyModule_GetState(module);
    PyObject *core_type = PyType_FromModuleAndSpec(module, &core_spec, NULL);
    int result;
    *context_type = PyType_FromModuleAndSpec(module, &context_spec, NULL);
    result = core_type && *context_type && PyModule_AddObjectRef(module, "Core", core_type) == 0
            && PyModule_AddObjectRef(module, "Context", *context_type) == 0
        ? 0
        : -1;
    Py_XDECREF(core_type);
    return result;
}

static int clear(PyObject *module) {
    Py_CLEAR(*(PyObject **)PyModule_GetState(module));
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, add_types}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "Starts and reaps plain launches; see native.c.",
    .m_size = sizeof(PyObject *),
    .m_slots = module_slots,
    .m_clear = clear,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
