/*
 * Runs one command in the RISC-V host for scripts/host, and ends all its processes when the caller exits.
 *
 *   session NAME FOLDER [VARIABLE=VALUE]... -- COMMAND [ARGUMENT]...
 *   session @FILE            the same words, each terminated by a zero byte, from a file, which is removed
 *   session --end NAME...    ends these sessions, and prevents those that have not started yet
 *
 * It runs as the child of the SSH server, and does what shells cannot do:
 *  - the shared folders are mounted anew for each command (/etc/shares), so that no command sees names or pages which an
 *    earlier one left in the kernel's caches, while the other machine rebuilt the files;
 *  - the command ends when its caller does. The SSH server does not report a caller's exit: scripts/host does, with --end;
 *  - processes that the command leaves running end with it, and its exit code is returned (128 + N for signal N, 127 not found).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GRACE_MS 2000
#define MARKS "/run/sessions/"
#define ENDED "/run/ended/"

/* Each line of /etc/shares: TAG FLAGS PATH. FLAGS contains an f if every command gets a mount of its own. */
static void mount_shares(void)
{
    FILE *shares = fopen("/etc/shares", "re");
    char *line = NULL;
    size_t room = 0;
    if (!shares)
        return;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
        perror("session: cannot make a mount namespace");
        fclose(shares);
        return;
    }
    while (getline(&line, &room, shares) > 0) {
        char tag[32], flags[8];
        int path = 0;
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%31s %7s %n", tag, flags, &path) < 2 || !path || !strchr(flags, 'f'))
            continue;
        /* If all channels are in use, the mount that init made for all commands is used. */
        if (mount(tag, line + path, "9p", strchr(flags, 'r') ? MS_RDONLY : 0,
                  "trans=virtio,version=9p2000.L,msize=512000,cache=mmap") && errno != EBUSY)
            fprintf(stderr, "session: cannot mount %s: %s\n", line + path, strerror(errno));
    }
    free(line);
    fclose(shares);
}

/* The first child of this process, or 0. Orphans of the command become children of this process. */
static pid_t any_child(void)
{
    char path[64];
    pid_t pid = 0;
    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    FILE *children = fopen(path, "re");
    if (children) {
        if (fscanf(children, "%d", &pid) != 1)
            pid = 0;
        fclose(children);
    }
    return pid;
}

static long now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000L + now.tv_nsec / 1000000;
}

/* Replaces the words of the command line by those in the file; returns their number. */
static int read_words(const char *path, char ***words)
{
    FILE *file = fopen(path, "re");
    char *word = NULL;
    size_t room = 0;
    int count = 1;
    if (!file) {
        fprintf(stderr, "session: cannot open %s: %s\n", path, strerror(errno));
        exit(126);
    }
    *words = calloc(2, sizeof **words);
    while (getdelim(&word, &room, 0, file) >= 0) {
        *words = realloc(*words, (count + 2) * sizeof **words);
        (*words)[count++] = word;
        (*words)[count] = NULL;
        word = NULL;
    }
    fclose(file);
    unlink(path);
    return count;
}

/* Of --end and the start of that session, the second one sees the file of the first. */
static int end_sessions(char **names)
{
    for (; *names; names++) {
        char path[256];
        int pid = 0;
        snprintf(path, sizeof path, ENDED "%s", *names);
        close(open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
        snprintf(path, sizeof path, MARKS "%s", *names);
        FILE *mark = fopen(path, "re");
        if (!mark)
            continue;
        if (fscanf(mark, "%d", &pid) == 1 && pid > 1)
            kill(pid, SIGTERM);
        fclose(mark);
    }
    return 0;
}

int main(int argc, char **argv)
{
    int at = 3, status = 0, ended = 0, gone = 0;
    if (argc > 1 && !strcmp(argv[1], "--end"))
        return end_sessions(argv + 2);
    if (argc == 2 && argv[1][0] == '@')
        argc = read_words(argv[1] + 1, &argv);
    for (; at < argc && strcmp(argv[at], "--"); at++)
        putenv(argv[at]);
    if (++at >= argc) {
        fprintf(stderr, "usage: session NAME FOLDER [VARIABLE=VALUE]... -- COMMAND [ARGUMENT]...\n");
        return 2;
    }

    sigset_t signals, before;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGHUP);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGQUIT);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGTSTP);
    sigprocmask(SIG_BLOCK, &signals, &before);
    int news = signalfd(-1, &signals, SFD_CLOEXEC);

    char mark[256], end[256];
    snprintf(mark, sizeof mark, MARKS "%s", argv[1]);
    snprintf(end, sizeof end, ENDED "%s", argv[1]);
    FILE *file = fopen(mark, "we");
    if (file) {
        fprintf(file, "%d\n", (int)getpid());
        fclose(file);
    }
    if (!access(end, F_OK)) {
        unlink(mark);
        return 128 + SIGTERM;
    }

    mount_shares();
    if (chdir(argv[2]) && chdir("/root"))
        perror("session: cannot change to /root");

    prctl(PR_SET_CHILD_SUBREAPER, 1);

    int terminal = isatty(0);
    pid_t child = fork();
    if (child < 0) {
        perror("session: fork");
        return 126;
    }
    if (child == 0) {
        if (!terminal)
            setsid();
        signal(SIGPIPE, SIG_DFL);
        sigprocmask(SIG_SETMASK, &before, NULL);
        execvp(argv[at], argv + at);
        fprintf(stderr, "session: cannot run %s: %s\n", argv[at], strerror(errno));
        _exit(errno == ENOENT ? 127 : 126);
    }

    /* Only the command keeps standard input: another open read end would hide that the command closed it. */
    if (!terminal) {
        int nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
        dup2(nothing, 0);
    }

    long deadline = 0;
    while (!ended) {
        struct pollfd watched[3] = { { news, POLLIN, 0 }, { gone ? -1 : 1, 0, 0 }, { gone ? -1 : 2, 0, 0 } };
        poll(watched, 3, deadline ? 100 : -1);
        if (watched[0].revents & POLLIN) {
            struct signalfd_siginfo signal;
            if (read(news, &signal, sizeof signal) != sizeof signal)
                continue;
            /* On a terminal, keys signal the command directly; this process only handles the terminal's hangup. */
            if (signal.ssi_signo == SIGHUP || signal.ssi_signo == SIGTERM)
                gone = 1;
        }
        if ((watched[1].revents | watched[2].revents) & (POLLERR | POLLHUP | POLLNVAL))
            gone = 1;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
            if (pid == child) {
                ended = 1;
                break;
            }
        if (gone && !ended) {
            if (!deadline) {
                deadline = now_ms() + GRACE_MS;
                /* A child that has not called setsid() yet has no group. */
                if (terminal || kill(-child, SIGTERM))
                    kill(child, SIGTERM);
            } else if (now_ms() >= deadline) {
                kill(child, SIGKILL);
            }
        }
    }

    int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    for (pid_t pid; (pid = any_child()) > 0;) {
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
    }
    unlink(mark);
    return code;
}
