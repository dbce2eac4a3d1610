/* The interface between halfstep.optim.backends.native (Python, ctypes) and the compiled update.
 *
 * One call does all jobs of an update: Python fills a table with one row for each parameter, C shares the work out
 * over threads and returns when all is done. Nothing here knows of torch or of Python, so one library serves every
 * version of both. The meaning of every number is that of halfstep/optim/{masters,moments,rules,dither}.py, and
 * halfstep/optim/backends/eager.py is the oracle.
 */
#ifndef HALFSTEP_H
#define HALFSTEP_H

#include <stdint.h>

/* Raised whenever a structure or the meaning of a field changes; native.py refuses another. */
#define HS_VERSION 3

#if defined(__GNUC__)
#define HS_EXPORT __attribute__((visibility("default")))
#else
#define HS_EXPORT
#endif

/* How a tensor's elements are stored. */
enum hs_format {
    HS_ABSENT = 0,
    HS_FP32 = 1,
    HS_BF16 = 2,
    HS_FP16 = 3,
    HS_INT16 = 4,
    HS_INT8 = 5,
    HS_UINT8 = 6
};

enum hs_kind { HS_ADAM = 0, HS_SGD = 1, HS_LION = 2 };

enum hs_result { HS_DONE = 0, HS_NO_MEMORY = 1, HS_UNKNOWN_FORMAT = 2 };

#define HS_STATES 3

/* One parameter's update. Every field has eight bytes: Python writes the table as an array of 64-bit integers. */
struct hs_job {
    void *parameter;
    const void *gradient;
    void *kept;               /* what is kept beside a 16-bit parameter, or NULL */
    void *states[HS_STATES];
    float *scales[HS_STATES]; /* one for each group of 64, for states of 8 bits */
    float *step;              /* steps applied so far; counted up here */
    int64_t numel;
    int64_t row;              /* groups of 64 do not cross a multiple of this */
    int64_t seed;             /* of seed and ordinal the lower 32 bits count */
    int64_t ordinal;          /* the parameter's place among all of the optimizer's */
    int64_t first;            /* of a part of a sharded parameter: the index of its first element in the whole */
    int64_t formats;          /* hs_format, four bits each: parameter, gradient, kept, states */
};

/* The hyperparameters of halfstep/optim/rules.py. */
struct hs_rule {
    double lr;
    double beta1; /* momentum, for SGD */
    double beta2; /* dampening, for SGD */
    double eps;
    double weight_decay;
    int32_t kind; /* hs_kind */
    int32_t decoupled;
    int32_t amsgrad;
    int32_t nesterov;
    int32_t maximize;
    int32_t stochastic;
    int32_t unscale; /* write each gradient that is not fp16 back, times the coefficient */
};

/* One gradient to look at, and what was found. */
struct hs_gradient {
    const void *data;
    int64_t numel;
    int64_t format; /* hs_format */
};

/* A 16-bit parameter and its FP32 master. */
struct hs_pair {
    const uint16_t *parameter;
    float *master;
    int64_t numel;
    int64_t format; /* hs_format of the parameter */
};

HS_EXPORT int32_t hs_version(void);

/* Bytes of hs_job, hs_rule, hs_gradient, hs_pair: what the other side must agree with. */
HS_EXPORT void hs_sizes(int64_t sizes[4]);

/* Step every job. `coefficient` and `found_inf` may be NULL. Returns hs_result. */
HS_EXPORT int32_t hs_update(const struct hs_job *jobs, int64_t count, const struct hs_rule *rule,
                            const float *coefficient, const float *found_inf, int32_t threads);

/* The sum of squares of all elements, and each gradient's largest magnitude (NaN where one is NaN). */
HS_EXPORT int32_t hs_survey(const struct hs_gradient *gradients, int64_t count, double *sum_of_squares, float *amax,
                            int32_t threads);

/* Set each element of a master that does not round to its parameter's to what the parameter is. Returns hs_result. */
HS_EXPORT int32_t hs_follow(const struct hs_pair *pairs, int64_t count, int32_t threads);

#endif
