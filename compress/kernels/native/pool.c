/* Threads for a call: torch's own, where they can be had, or a small pool of threads that sleep between calls.
 *
 * Threads of OpenMP spin for a while after their work. Beside torch, a second set of threads would wait for those to
 * give up their processors, so work goes through the OpenMP that torch runs on (ck_set_team). Threads of the pool are
 * made on the first call that asks for them and never end. A forked child has none of its parent's threads and OpenMP
 * does not make new ones there, so it starts with an empty pool and uses nothing else.
 */
#include "common.h"

#include <pthread.h>
#include <signal.h>

#define MOST_THREADS 64

static pthread_mutex_t calls = PTHREAD_MUTEX_INITIALIZER; /* held during a call: one at a time */
static pthread_mutex_t state = PTHREAD_MUTEX_INITIALIZER; /* guards what follows */
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER;
static pthread_cond_t ended = PTHREAD_COND_INITIALIZER;
static int made = 0;          /* threads of the pool */
static uint64_t call = 0;     /* number of the present call */
static int waited_for = 0;    /* helpers that have not finished it */
static int helpers = 0;       /* threads 0 to helpers - 1 take part in it */
static ck_task job;
static void *job_argument;
static int64_t job_count, job_share;
static pthread_once_t watch_forks = PTHREAD_ONCE_INIT;

typedef void (*team_start)(void (*task)(void *), void *argument, unsigned threads, unsigned flags);
static team_start start_team = NULL; /* GOMP_parallel */
static int (*place_in_team)(void), (*size_of_team)(void);

static void run_share(int64_t place, ck_task task, void *argument, int64_t count, int64_t share) {
    int64_t begin = place * share;
    if (begin < count) task(argument, begin, ck_min(begin + share, count));
}

static void *helper(void *number) {
    int place = (int)(intptr_t)number;
    uint64_t seen = 0;
    pthread_mutex_lock(&state);
    for (;;) {
        while (call == seen || place >= helpers) {
            seen = call;
            pthread_cond_wait(&begun, &state);
        }
        seen = call;
        ck_task task = job;
        void *argument = job_argument;
        int64_t count = job_count, share = job_share;
        pthread_mutex_unlock(&state);
        run_share(place + 1, task, argument, count, share);
        pthread_mutex_lock(&state);
        if (--waited_for == 0) pthread_cond_signal(&ended);
    }
    return NULL;
}

static void forget_threads(void) {
    pthread_mutex_init(&calls, NULL);
    pthread_mutex_init(&state, NULL);
    pthread_cond_init(&begun, NULL);
    pthread_cond_init(&ended, NULL);
    made = helpers = waited_for = 0;
    start_team = NULL;
}

static void register_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

/* Make threads until there are `wanted`; as many as there are is what a call gets. Signals go to the caller. */
static void grow(int wanted) {
    pthread_attr_t detached;
    sigset_t all, before;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (made < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &detached, helper, (void *)(intptr_t)made)) break;
        made++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
}

/* Run through an OpenMP from now on: its GOMP_parallel, omp_get_thread_num and omp_get_num_threads. */
CK_EXPORT void ck_set_team(void *start, void *place, void *size) {
    pthread_once(&watch_forks, register_forks);
    memcpy(&start_team, &start, sizeof start);
    memcpy(&place_in_team, &place, sizeof place);
    memcpy(&size_of_team, &size, sizeof size);
}

typedef struct {
    ck_task task;
    void *argument;
    int64_t count, shares, grain;
} team_call;

static void run_in_team(void *argument) {
    const team_call *of = argument;
    int64_t share = ck_ceil_div(of->shares, size_of_team()) * of->grain;
    run_share(place_in_team(), of->task, of->argument, of->count, share);
}

void ck_parallel(int64_t count, int64_t grain, int threads, ck_task task, void *argument) {
    int64_t shares = ck_ceil_div(count, grain);
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (shares < threads) threads = (int)shares;
    if (count <= 0) return;
    pthread_once(&watch_forks, register_forks);
    if (threads < 2 || pthread_mutex_trylock(&calls)) {
        task(argument, 0, count);
        return;
    }
    if (start_team) {
        team_call of = {.task = task, .argument = argument, .count = count, .shares = shares, .grain = grain};
        start_team(run_in_team, &of, (unsigned)threads, 0);
        pthread_mutex_unlock(&calls);
        return;
    }
    pthread_mutex_lock(&state);
    grow(threads - 1);
    helpers = made < threads - 1 ? made : threads - 1;
    waited_for = helpers;
    job = task;
    job_argument = argument;
    job_count = count;
    job_share = ck_ceil_div(shares, helpers + 1) * grain;
    int64_t share = job_share;
    call++;
    pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&state);
    run_share(0, task, argument, count, share);
    pthread_mutex_lock(&state);
    while (waited_for) pthread_cond_wait(&ended, &state);
    pthread_mutex_unlock(&state);
    pthread_mutex_unlock(&calls);
}
