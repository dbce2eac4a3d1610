/* What is computed once for each parameter before its elements are touched, and how loops are compiled. */
#ifndef HALFSTEP_PLAN_H
#define HALFSTEP_PLAN_H

#include "dither.h"
#include "halfstep.h"

/* Elements in a scratch block of the general path: six of these stay in the first-level cache. */
#define BLOCK 512
#define GROUP 64

/* One library for every x86-64 processor: the loader picks the widest version that this one runs. Elsewhere the
 * compiler's default is what every processor has (NEON on arm64). */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(HS_PORTABLE)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* torch's lerp: from the nearer end. */
struct lerp {
    float weight;
    int from_end;
};

ALWAYS float lerp(struct lerp how, float start, float end) {
    return __builtin_fmaf(how.weight, end - start, how.from_end ? end : start);
}

struct plan;

/* Step the elements from `begin` on; their first group of 64 is the parameter's `group`-th. */
typedef void (*hs_segment)(const struct plan *plan, int64_t begin, int64_t count, int64_t group);

struct plan {
    struct hs_job job;
    enum hs_format parameter, gradient, kept, states[HS_STATES];
    /* Where the elements' groups begin anew; the parameter's length where groups do not care. */
    int64_t row;
    int64_t first_piece; /* this parameter's place among all pieces of work */
    hs_segment segment;
    hs_segment rare; /* what a wide loop calls for what it leaves out */

    enum hs_kind kind;
    int amsgrad, nesterov, decoupled;
    int first_step;     /* momentum begins as the gradient */
    float coefficient;  /* what gradients are multiplied by; negative to maximize */
    int unscale;        /* in memory too, when they have been used */
    float decay;        /* weight decay added to the gradient; 0: none */
    float shrink;       /* 1 - lr * weight decay */
    struct lerp first, second;
    float beta2, one_minus_beta2;
    float root;         /* sqrt(1 - beta2^step) */
    float eps;
    float minus_size;   /* -lr / (1 - beta1^step), or -lr */
    float momentum, undamped;
    int dithered;       /* the weight is rounded stochastically */
    struct stream weight_noise, state_noise[HS_STATES];
};

/* Steps of the general path, each over one block of at most BLOCK elements from `begin` on. */
void hs_decode_gradient(const struct plan *plan, int64_t begin, int count, float *g);
void hs_decode_master(const struct plan *plan, int64_t begin, int count, float *x);
void hs_encode_master(const struct plan *plan, int64_t begin, int count, const float *x);
void hs_decode_state(const struct plan *plan, int which, int64_t begin, int count, int64_t group, float *state);
void hs_encode_state(const struct plan *plan, int which, int64_t begin, int count, int64_t group, const float *state);
void hs_apply(const struct plan *plan, int count, float *x, float *g, float *const states[HS_STATES]);

/* The general path: any combination, through scratch blocks. */
void hs_segment_general(const struct plan *plan, int64_t begin, int64_t count, int64_t group);

/* A loop made for what the plan stores, or NULL; of the wide ones, NULL also where the processor has no AVX-512. */
hs_segment hs_fused_adam(const struct plan *plan);
hs_segment hs_adam_8bit(const struct plan *plan);
hs_segment hs_wide_adam(const struct plan *plan);
hs_segment hs_wide_adam_8bit(const struct plan *plan);
hs_segment hs_wide_momentum(const struct plan *plan);

/* Run `work(context)` on `threads` threads, this one among them. */
void hs_run(int threads, void (*work)(void *), void *context);

#endif
