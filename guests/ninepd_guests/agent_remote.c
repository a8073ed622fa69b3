/* Part of agent.c: the process that makes system calls on request. */
#include "agent_wire.c"

#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>

enum { CONTROL_FD = 1000 }; /* out of the way: a test sees its first open() give 3 */

static sigjmp_buf fault;

static void on_fault(int signal) { siglongjmp(fault, signal); }

/* Touches memory as a program would. Returns the signal that it drew. */
static __attribute__((noinline)) int touch(void *to, const void *from, size_t size) {
    int signal = sigsetjmp(fault, 1);

    if (!signal)
        memcpy(to, from, size);
    return signal;
}

static void on_interrupt(int signal) {
    (void)signal; /* only there so that a blocked call returns EINTR */
}

static void answer(struct queue *out, const char *req, long result, int error) {
    char text[96];

    snprintf(text, sizeof text, "ret %s %ld %d", req, result, error);
    queue_text(out, text);
}

static void remote_syscall(struct queue *out, const char *req, char *rest) {
    long nr = number(&rest), argument[6] = {0}, result;
    struct {
        char kind;
        uint8_t *data;
        size_t size;
    } buffer[6] = {0};

    for (int i = 0; i < 6 && rest; i++) {
        char *w = word(&rest);

        buffer[i].kind = *w;
        if (*w == '<' || *w == '=') {
            buffer[i].data = (uint8_t *)w + 1;
            buffer[i].size = decode(w + 1);
            argument[i] = (long)buffer[i].data;
        } else if (*w == '>' || *w == '~') {
            buffer[i].size = strtoul(w + 1, NULL, 0);
            buffer[i].data = calloc(1, buffer[i].size + 1);
            argument[i] = (long)buffer[i].data;
        } else {
            argument[i] = (long)strtoull(w, NULL, 0);
        }
    }
    errno = 0;
    result =
        syscall(nr, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
    answer(out, req, result, result == -1 ? errno : 0);
    for (int i = 0; i < 6; i++) {
        bool made = buffer[i].kind == '>' || buffer[i].kind == '~';
        size_t size = buffer[i].size;

        if (buffer[i].kind == '~')
            size = result < 0 ? 0 : (size_t)result < size ? (size_t)result : size;
        if (made || buffer[i].kind == '=') {
            queue_text(out, " ");
            queue_base64(out, buffer[i].data, size);
        }
        if (made)
            free(buffer[i].data);
    }
    queue_text(out, "\n");
}

/* A SIGBUS or SIGSEGV becomes the answer: minus the signal, with EFAULT. */
static void remote_memory(struct queue *out, const char *req, bool store, char *rest) {
    uint8_t *address = (uint8_t *)strtoull(word(&rest), NULL, 0);
    char *data = word(&rest);
    size_t size = store ? decode(data) : strtoul(data, NULL, 0);
    uint8_t *copy = store ? (uint8_t *)data : calloc(1, size + 1);
    int signal = store ? touch(address, copy, size) : touch(copy, address, size);

    answer(out, req, signal ? -signal : (long)size, signal ? EFAULT : 0);
    if (!store) {
        queue_text(out, " ");
        queue_base64(out, copy, signal ? 0 : size);
        free(copy);
    }
    queue_text(out, "\n");
}

static _Noreturn void remote(void) {
    struct queue in = {0}, out = {0};
    struct sigaction interrupt = {.sa_handler = on_interrupt}, bad = {.sa_handler = on_fault};

    sigaction(SIGUSR1, &interrupt, NULL);
    sigaction(SIGBUS, &bad, NULL);
    sigaction(SIGSEGV, &bad, NULL);
    for (;;) {
        char *rest;

        while ((rest = queue_line(&in))) {
            char *req = word(&rest), *verb = word(&rest);

            if (!strcmp(verb, "sys"))
                remote_syscall(&out, req, rest);
            else
                remote_memory(&out, req, !strcmp(verb, "poke"), rest);
            if (!queue_write(&out, CONTROL_FD))
                _exit(0);
        }
        if (!queue_read(&in, CONTROL_FD, 1 << 16))
            _exit(0);
    }
}
