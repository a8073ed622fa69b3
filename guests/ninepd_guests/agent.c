/*
 * The guest's PID 1: makes a Linux of a bare kernel, then serves the host over one character
 * device, so that a test is host code that does things in the guest.
 *
 * One request or answer a line, words apart by a space, binary in base64. ID names a job, REQ a
 * question; the host chooses both.
 *
 *   to the guest                      from the guest
 *   run ID COMMAND                    up                           ready (again, after a reboot)
 *   tty ID COMMAND ROWS COLS          out ID DATA                  output of run and tty
 *   in  ID DATA                       end ID STATUS                as the shell's $?
 *   win ID ROWS COLS                  ret REQ RESULT ERRNO DATA... answer to do
 *   new ID                            bye                          about to stop
 *   do  ID REQ sys NR ARGUMENT...
 *   do  ID REQ peek ADDRESS SIZE
 *   do  ID REQ poke ADDRESS DATA
 *   sig ID SIGNAL
 *   off | boot                        ack BYTES                    read from a terminal line
 *
 * A `new` job is a process that makes the system calls it is asked for, in its own time, so one
 * that blocks blocks nobody else. ARGUMENT: a number; <DATA a buffer to read; >SIZE a buffer that
 * comes back whole; ~SIZE one that comes back up to RESULT; =DATA one that goes and comes back.
 */
#define _GNU_SOURCE
#include "agent_remote.c"
#include "agent_setup.c"

#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum {
    CHUNK = 24 * 1024,        /* output bytes in one line */
    LINE_MAX_BYTES = 8 << 20, /* the host cuts its buffers to fit */
    ENOUGH_QUEUED = 1 << 20,  /* stop reading jobs while the host is this far behind */
    JOBS = 256,
};

struct job {
    enum { FREE, RUN, TTY, REMOTE } kind;
    long id;
    pid_t pid;
    int fd;
    bool eof;
    struct queue in, answers;
};

static struct job jobs[JOBS];
static struct queue line_in, line_out;
static int line;
static bool acknowledge;

static struct job *job_by_id(long id) {
    for (int i = 0; i < JOBS; i++)
        if (jobs[i].kind != FREE && jobs[i].id == id)
            return &jobs[i];
    return NULL;
}

static void report_end(long id, int status) {
    char text[64];

    snprintf(text, sizeof text, "end %ld %d\n", id, status);
    queue_text(&line_out, text);
}

static void report_output(long id, const uint8_t *data, size_t bytes) {
    char text[32];

    snprintf(text, sizeof text, "out %ld ", id);
    queue_text(&line_out, text);
    queue_base64(&line_out, data, bytes);
    queue_text(&line_out, "\n");
}

static void refuse(long id, const char *what) {
    char text[128];
    int n = snprintf(text, sizeof text, "guest agent: %s: %s\n", what, strerror(errno));

    report_output(id, (uint8_t *)text, (size_t)n);
    report_end(id, 255);
}

static _Noreturn void become_job(int kind, int fd, const char *command) {
    sigset_t none;
    int null = open("/dev/null", O_RDWR);

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (kind != TTY) {
        setsid();
        dup2(null, 0);
        dup2(kind == RUN ? fd : null, 1);
        dup2(kind == RUN ? fd : null, 2);
    }
    if (kind != REMOTE)
        signal(SIGPIPE, SIG_DFL);
    if (kind == REMOTE) {
        dup2(fd, CONTROL_FD);
        close_range(3, CONTROL_FD - 1, 0);
        close_range(CONTROL_FD + 1, ~0U, 0);
        fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC);
        remote();
    }
    execl("/bin/sh", kind == TTY ? "-sh" : "sh", kind == TTY && !*command ? NULL : "-c", command,
          NULL);
    perror("/bin/sh");
    _exit(127);
}

static void start_job(int kind, char *rest) {
    long id = number(&rest);
    char *command = word(&rest);
    struct winsize size = {.ws_row = (unsigned short)number(&rest)};
    struct job *job = NULL;
    int pair[2] = {-1, -1};

    size.ws_col = (unsigned short)number(&rest);
    command[decode(command)] = '\0';
    for (int i = 0; i < JOBS && !job; i++)
        if (jobs[i].kind == FREE)
            job = &jobs[i];
    errno = EAGAIN;
    if (!job)
        return refuse(id, "too many jobs");
    *job = (struct job){.id = id};
    if (kind == RUN ? pipe2(pair, O_CLOEXEC)
                    : kind == REMOTE && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        return refuse(id, "no pipe");
    job->pid = kind == TTY ? forkpty(&job->fd, NULL, NULL, &size) : fork();
    if (!job->pid)
        become_job(kind, pair[1], command);
    if (kind != TTY) {
        job->fd = pair[0];
        close(pair[1]);
    }
    if (job->pid < 0) {
        close(pair[0]);
        return refuse(id, "fork");
    }
    fcntl(job->fd, F_SETFD, FD_CLOEXEC);
    fcntl(job->fd, F_SETFL, O_NONBLOCK | fcntl(job->fd, F_GETFL));
    job->kind = kind;
}

static void read_job(struct job *job) {
    if (job->kind == REMOTE) {
        char *text;

        job->eof |= !queue_read(&job->answers, job->fd, 1 << 16);
        while ((text = queue_line(&job->answers))) {
            queue_text(&line_out, text);
            queue_text(&line_out, "\n");
        }
    } else {
        uint8_t data[CHUNK];
        ssize_t n = read(job->fd, data, sizeof data);

        if (n > 0)
            report_output(job->id, data, (size_t)n);
        else
            job->eof |= !n || (errno != EAGAIN && errno != EINTR);
    }
}

/* Has a job that ended left output? A terminal's may still be on its way, by a worker of the
 * kernel; that nothing more comes is told by an error (EIO). */
static int left_output(const struct job *job) {
    struct pollfd terminal = {.fd = job->fd, .events = POLLIN};
    int pending = 0;

    if (job->kind == TTY)
        return poll(&terminal, 1, 100) > 0;
    return !ioctl(job->fd, FIONREAD, &pending) && pending > 0;
}

static void reap(void) {
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (int i = 0; i < JOBS; i++) {
            struct job *job = &jobs[i];

            if (job->kind == FREE || job->pid != pid)
                continue;
            /* What is in the pipe is the job's; what a background child adds later is not. */
            for (int reads = 0; reads < 1000 && !job->eof && left_output(job); reads++)
                read_job(job);
            report_end(job->id, WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
            close(job->fd);
            free(job->in.data);
            free(job->answers.data);
            job->kind = FREE;
        }
    }
}

static _Noreturn void stop(int how) {
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, 0) > 0)
        ;
    if (chdir("/"))
        perror("/");
    unmount_shares();
    queue_text(&line_out, "bye\n");
    fcntl(line, F_SETFL, O_RDWR);
    queue_write(&line_out, line);
    tcdrain(line);
    reboot(how);
    die("reboot");
}

static void serve(char *rest) {
    char *verb = word(&rest);
    struct job *job;

    if (!strcmp(verb, "run"))
        return start_job(RUN, rest);
    if (!strcmp(verb, "tty"))
        return start_job(TTY, rest);
    if (!strcmp(verb, "new"))
        return start_job(REMOTE, rest);
    if (!strcmp(verb, "off"))
        stop(RB_POWER_OFF);
    if (!strcmp(verb, "boot"))
        stop(RB_AUTOBOOT);
    job = job_by_id(number(&rest));
    if (!job || !rest)
        return; /* it has just ended, and the host is about to read so */
    if (!strcmp(verb, "do")) {
        queue_text(&job->in, rest);
        queue_text(&job->in, "\n");
    } else if (!strcmp(verb, "in")) {
        queue_put(&job->in, rest, decode(rest));
    } else if (!strcmp(verb, "win")) {
        struct winsize size = {.ws_row = (unsigned short)number(&rest)};

        size.ws_col = (unsigned short)number(&rest);
        ioctl(job->fd, TIOCSWINSZ, &size);
    } else if (!strcmp(verb, "sig")) {
        kill(job->kind == REMOTE ? job->pid : -job->pid, (int)number(&rest));
    }
}

static void read_line(void) {
    ssize_t n = queue_read(&line_in, line, 1 << 16);

    if (!n)
        stop(RB_POWER_OFF); /* the host program is gone */
    if (n > 0 && acknowledge) {
        char text[32];

        snprintf(text, sizeof text, "ack %zd\n", n);
        queue_text(&line_out, text);
    }
}

static void loop(int children) {
    struct pollfd polls[JOBS + 2];
    struct job *polled[JOBS + 2];

    for (;;) {
        int n = 2;
        char *request;

        polls[0] = (struct pollfd){line, POLLIN, 0};
        if (queued(&line_out))
            polls[0].events |= POLLOUT;
        polls[1] = (struct pollfd){children, POLLIN, 0};
        for (int i = 0; i < JOBS; i++) {
            short events = queued(&line_out) < ENOUGH_QUEUED ? POLLIN : 0;

            if (jobs[i].kind == FREE || jobs[i].eof)
                continue;
            if (queued(&jobs[i].in))
                events |= POLLOUT;
            polled[n] = &jobs[i];
            polls[n++] = (struct pollfd){events ? jobs[i].fd : -1, events, 0};
        }
        if (poll(polls, (nfds_t)n, -1) < 0 && errno != EINTR)
            die("poll");
        for (int i = 2; i < n; i++) {
            if (polls[i].revents & POLLOUT)
                queue_write(&polled[i]->in, polled[i]->fd);
            if (polls[i].revents & (POLLIN | POLLHUP | POLLERR))
                read_job(polled[i]);
        }
        if (polls[1].revents) {
            struct signalfd_siginfo info;

            while (read(children, &info, sizeof info) > 0)
                ;
            reap();
        }
        if (polls[0].revents & ~POLLOUT)
            read_line();
        while ((request = queue_line(&line_in)))
            serve(request);
        if (queued(&line_in) > LINE_MAX_BYTES)
            die("the host sent a line without an end");
        if (!queue_write(&line_out, line))
            stop(RB_POWER_OFF);
    }
}

/* `agent` is a pattern: the number of a virtio port depends on what else the machine has. */
static void open_line(void) {
    const char *pattern = getenv("agent");
    struct termios mode;

    if (!pattern)
        pattern = "/dev/ttyS0";
    /* A virtio port appears some time after its driver. */
    line = -1;
    for (int tries = 0; line < 0; tries++) {
        glob_t found;

        errno = ENOENT;
        if (!glob(pattern, 0, NULL, &found)) {
            line = open(found.gl_pathv[0], O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
            globfree(&found);
        }
        if (line < 0 && tries == 10000)
            die(pattern);
        if (line < 0)
            usleep(1000);
    }
    if (!tcgetattr(line, &mode)) {
        cfmakeraw(&mode);
        mode.c_cflag |= CLOCAL | CREAD;
        tcsetattr(line, TCSANOW, &mode);
        acknowledge = true;
    }
}

int main(void) {
    sigset_t mask;

    set_up();
    setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin", 1);
    setenv("HOME", "/root", 1);
    sethostname("guest", 5);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&mask);
    sigaddset(&mask, SIGCHLD);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    open_line();
    queue_text(&line_out, "\nup\n");
    loop(signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK));
}
