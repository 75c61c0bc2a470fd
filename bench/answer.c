// answer FILE PROMPT LINE TEXT COMMAND...: runs a command with pipes as its input and output, sends it LINE once its output contains
// PROMPT (at once if that is empty), and waits until the output contains TEXT. Writes the nanoseconds from just before exec until then to
// FILE, and kills the command. A COMMAND that is unix:PATH is a socket instead, to which it connects. Exits with 1 without an answer.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char output[1 << 20];
static size_t len;

// With a system call: see timed.c.
static int64_t now(void) {
	struct timespec t;
	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void late(int number) {
	(void)number;
}

static int await(int from, const char *text) {
	while (!memmem(output, len, text, strlen(text))) {
		ssize_t got = read(from, output + len, sizeof output - len);
		if (got <= 0)
			return 0;
		len += got;
	}
	return 1;
}

int main(int argc, char **argv) {
	if (argc < 6) {
		fprintf(stderr, "usage: answer FILE PROMPT LINE TEXT COMMAND...\n");
		return 2;
	}
	const char *prompt = argv[2], *line = argv[3], *text = argv[4], *command = argv[5];
	// Opened first, so that its cost is not counted.
	FILE *out = fopen(argv[1], "w");
	if (!out) {
		perror(argv[1]);
		return 2;
	}
	int to, from;
	pid_t child = 0;
	int64_t start = now();
	if (strncmp(command, "unix:", 5) == 0) {
		struct sockaddr_un address = {.sun_family = AF_UNIX};
		strncpy(address.sun_path, command + 5, sizeof address.sun_path - 1);
		to = from = socket(AF_UNIX, SOCK_STREAM, 0);
		if (connect(to, (struct sockaddr *)&address, sizeof address) != 0) {
			perror(command);
			return 1;
		}
	} else {
		int in[2], back[2];
		if (pipe2(in, 0) != 0 || pipe2(back, 0) != 0) {
			perror("pipe");
			return 2;
		}
		start = now();
		child = vfork();
		if (child == 0) {
			dup2(in[0], 0);
			dup2(back[1], 1);
			close(in[0]);
			close(in[1]);
			close(back[0]);
			close(back[1]);
			execvp(command, argv + 5);
			_exit(127);
		}
		close(in[0]);
		close(back[1]);
		to = in[1];
		from = back[0];
	}
	// A guest that has not answered by then never will: the system call that waits for it fails.
	sigaction(SIGALRM, &(struct sigaction){.sa_handler = late}, NULL);
	alarm(60);
	int answered = await(from, prompt) && write(to, line, strlen(line)) > 0 && write(to, "\n", 1) == 1 && await(from, text);
	int64_t end = now();
	if (child > 0) {
		kill(child, SIGTERM);
		waitpid(child, NULL, 0);
	}
	if (!answered) {
		fwrite(output, 1, len, stderr);
		fprintf(stderr, "%s: no answer\n", command);
		return 1;
	}
	fprintf(out, "%lld\n", (long long)(end - start));
	return fclose(out) == 0 ? 0 : 2;
}
