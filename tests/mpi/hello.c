/*
 * Every rank prints where it is, checks an all-reduce over all of them, and may stay alive.
 *
 *   mpicc -O2 -o hello hello.c
 *   mpirun -n 4 ./hello [SECONDS]
 *
 * "rank 0 of 4 host H node N pid P cpus 0-1", where N is what pilotq calls the node (PILOTQ_NODE, else Slurm's name of
 * it, else the host). The exit code is 0 when the all-reduce gives the expected sum.
 */
#define _GNU_SOURCE
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The calling process's CPUs as "0-3,8". */
static void cpu_list(char *text, size_t size)
{
    cpu_set_t set;
    size_t used = 0;
    text[0] = '\0';
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return;
    for (int first = 0, last; first < CPU_SETSIZE; first = last + 1) {
        last = first;
        if (!CPU_ISSET(first, &set))
            continue;
        while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, &set))
            last++;
        if (used < size)
            used += snprintf(text + used, size - used, "%s%d", used ? "," : "", first);
        if (last > first && used < size)
            used += snprintf(text + used, size - used, "-%d", last);
    }
}

int main(int argc, char **argv)
{
    int rank, size, sum = 0;
    char host[256] = "", cpus[1024];
    const char *node = getenv("PILOTQ_NODE") ? getenv("PILOTQ_NODE") : getenv("SLURMD_NODENAME");

    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    gethostname(host, sizeof host - 1);
    cpu_list(cpus, sizeof cpus);
    printf("rank %d of %d host %s node %s pid %ld cpus %s\n", rank, size, host, node ? node : host, (long)getpid(), cpus);
    fflush(stdout);
    if (argc > 1)
        sleep((unsigned)atoi(argv[1]));
    MPI_Allreduce(&rank, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    MPI_Finalize();
    return sum == size * (size - 1) / 2 ? 0 : 1;
}
