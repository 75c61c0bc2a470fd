// timed FILE COMMAND...: runs the command and writes "elapsed user system", each in nanoseconds, to FILE. Elapsed is from
// just before exec until the process has been reaped. Exits with the command's code.
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// With a system call: QEMU starts harts with scounteren at 0, and Linux does not change it, so the vDSO takes an illegal instruction.
static int64_t now(void) {
	struct timespec t;
	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int64_t spent(struct timeval t) {
	return t.tv_sec * 1000000000ll + t.tv_usec * 1000ll;
}

int main(int argc, char **argv) {
	if (argc < 3) {
		fprintf(stderr, "usage: timed FILE COMMAND...\n");
		return 2;
	}
	// Opened first, so that its cost is not counted.
	FILE *out = fopen(argv[1], "w");
	if (!out) {
		perror(argv[1]);
		return 2;
	}
	int64_t start = now();
	pid_t child = vfork();
	if (child == 0) {
		execvp(argv[2], argv + 2);
		_exit(127);
	}
	int status;
	struct rusage used;
	pid_t ended;
	do
		ended = child < 0 ? -1 : wait4(child, &status, 0, &used);
	while (ended < 0 && errno == EINTR && child > 0);
	if (ended < 0) {
		perror(argv[2]);
		return 2;
	}
	int64_t end = now();
	fprintf(out, "%lld %lld %lld\n", (long long)(end - start), (long long)spent(used.ru_utime),
		(long long)spent(used.ru_stime));
	if (fclose(out) != 0) {
		perror(argv[1]);
		return 2;
	}
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
