/* Threads for the length of one call.
 *
 * A thread costs some ten microseconds to start, a step some milliseconds. A pool that outlives the call would be
 * faster by that little and broken in a child after fork, and a second OpenMP runtime beside torch's would make both
 * wait for each other.
 */
#include <pthread.h>

#include "plan.h"

#define MOST 256

struct work {
    void (*function)(void *);
    void *context;
};

static void *enter(void *argument) {
    const struct work *work = argument;
    work->function(work->context);
    return 0;
}

void hs_run(int threads, void (*function)(void *), void *context) {
    pthread_t others[MOST];
    struct work work = {function, context};
    int started = 0;
    while (started < threads - 1 && started < MOST && pthread_create(&others[started], 0, enter, &work) == 0) started++;
    function(context); /* takes what nobody else takes: no thread is needed for the work to be done */
    for (int i = 0; i < started; i++) pthread_join(others[i], 0);
}
