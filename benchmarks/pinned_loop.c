/* The ceiling of this machine: starts and reaps /bin/true so many times, one child on each of its cores at a time.
 *
 *     pinned_loop NUMBER        prints children a second
 *
 * Each child is what a task at least is: pinned to its core, in a session of its own, with 0, 1 and 2 set up. Nothing is
 * recorded, and nothing else is done.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CORES_MAX 1024

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

int main(int argc, char **argv)
{
    static char *const command[] = {"/bin/true", NULL}, *const environment[] = {NULL};
    long number = argc > 1 ? atol(argv[1]) : 0, started = 0, bad = 0;
    int cores[CORES_MAX], count = 0, running = 0, null = open("/dev/null", O_RDWR | O_CLOEXEC);
    pid_t pids[CORES_MAX] = {0};
    cpu_set_t mask;
    double began;

    if (null < 0 || sched_getaffinity(0, sizeof mask, &mask))
        fail("pinned_loop");
    for (int core = 0; core < CORES_MAX; core++)
        if (CPU_ISSET(core, &mask))
            cores[count++] = core;
    began = now();
    while (started < number || running) {
        for (int i = 0; i < count && started < number; i++) {
            if (pids[i])
                continue;
            cpu_set_t own;
            CPU_ZERO(&own);
            CPU_SET(cores[i], &own);
            pid_t pid = vfork();
            if (pid == 0) {
                if (sched_setaffinity(0, sizeof own, &own) || setsid() < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 ||
                    dup2(null, 2) < 0)
                    _exit(126);
                execve(command[0], command, environment);
                _exit(127);
            }
            if (pid < 0)
                fail("vfork");
            pids[i] = pid;
            running++;
            started++;
        }
        int status;
        struct rusage usage;
        pid_t ended = wait4(-1, &status, 0, &usage);
        if (ended < 0)
            fail("wait4");
        bad += status != 0;
        running--;
        for (int i = 0; i < count; i++)
            if (pids[i] == ended)
                pids[i] = 0;
    }
    printf("%.3f\n", number / (now() - began));
    return bad != 0;
}
