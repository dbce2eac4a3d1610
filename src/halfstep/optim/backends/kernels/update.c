/* One call: a plan for each job, and pieces of all of them shared out over threads. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "plan.h"

/* Elements in a piece of work, a whole number of groups: large, since memory is read ahead only within one, but so
 * small that each thread has PIECES of them on average, and threads end together. */
#define LARGEST 131072
#define SMALLEST 16384
#define PIECES 16
/* A thread is not worth starting for less. */
#define WORTH 65536

struct shared {
    const struct plan *plans;
    int64_t count;
    int64_t piece; /* groups in a piece */
    int64_t pieces;
    atomic_llong next;
};

static int64_t groups_in_row(const struct plan *plan) { return (plan->row + GROUP - 1) / GROUP; }

static int64_t rows_of(const struct plan *plan) { return plan->row ? plan->job.numel / plan->row : 0; }

/* Elements that are stepped before their gradients are written back: these are then still in the cache. */
#define UNSCALED 8192

CLONES static void unscale(const struct plan *plan, int64_t begin, int64_t count) {
    const float coefficient = __builtin_fabsf(plan->coefficient);
    if (plan->gradient == HS_FP32) {
        float *restrict gradient = (float *)(uintptr_t)plan->job.gradient + begin;
        for (int64_t i = 0; i < count; i++) gradient[i] *= coefficient;
    } else {
        uint16_t *restrict gradient = (uint16_t *)(uintptr_t)plan->job.gradient + begin;
        for (int64_t i = 0; i < count; i++) gradient[i] = to_bf16(from_bf16(gradient[i]) * coefficient);
    }
}

static void do_segment(const struct plan *plan, int64_t begin, int64_t count, int64_t group) {
    if (!plan->unscale) {
        plan->segment(plan, begin, count, group);
        return;
    }
    for (const int64_t end = begin + count; begin < end; begin += UNSCALED, group += UNSCALED / GROUP) {
        const int64_t here = end - begin < UNSCALED ? end - begin : UNSCALED;
        plan->segment(plan, begin, here, group);
        unscale(plan, begin, here);
    }
}

/* Pieces count in groups, which never cross a row. */
static void do_piece(const struct plan *plan, int64_t piece, int64_t size) {
    const int64_t in_row = groups_in_row(plan);
    const int64_t all = in_row * rows_of(plan);
    int64_t group = piece * size;
    const int64_t end = all - group < size ? all : group + size;
    while (group < end) {
        const int64_t row = group / in_row, within = group % in_row;
        const int64_t taken = end - group < in_row - within ? end - group : in_row - within;
        const int64_t begin = within * GROUP;
        const int64_t stop = begin + taken * GROUP < plan->row ? begin + taken * GROUP : plan->row;
        do_segment(plan, row * plan->row + begin, stop - begin, group);
        group += taken;
    }
}

static void do_pieces(void *context) {
    struct shared *shared = context;
    int64_t which = 0;
    for (;;) {
        const int64_t piece = atomic_fetch_add_explicit(&shared->next, 1, memory_order_relaxed);
        if (piece >= shared->pieces) return;
        while (which + 1 < shared->count && shared->plans[which + 1].first_piece <= piece) which++;
        do_piece(&shared->plans[which], piece - shared->plans[which].first_piece, shared->piece);
    }
}

static struct lerp lerp_of(double weight) {
    const float single = (float)weight;
    const int from_end = !(fabsf(single) < 0.5f);
    return (struct lerp){from_end ? single - 1.0f : single, from_end};
}

/* The scalars of one step, in double as Python computes them, then rounded as torch rounds a number that meets an
 * FP32 tensor. The root is a power with the exponent 0.5, as it is there: a square root may differ in the last bit. */
static void set_scalars(struct plan *plan, const struct hs_rule *rule, double step) {
    double size = rule->lr;
    if (rule->kind == HS_ADAM) {
        size = rule->lr / (1.0 - pow(rule->beta1, step));
        plan->root = (float)pow(1.0 - pow(rule->beta2, step), 0.5);
    }
    plan->minus_size = (float)-size;
    const int shrinks = rule->kind == HS_LION || (rule->kind == HS_ADAM && rule->decoupled);
    plan->shrink = shrinks && rule->weight_decay != 0.0 ? (float)(1.0 - rule->lr * rule->weight_decay) : 1.0f;
    plan->decay = shrinks ? 0.0f : (float)rule->weight_decay;
    plan->first = lerp_of(1.0 - rule->beta1);
    plan->second = lerp_of(1.0 - rule->beta2);
    plan->beta2 = (float)rule->beta2;
    plan->one_minus_beta2 = (float)(1.0 - rule->beta2);
    plan->eps = (float)rule->eps;
    plan->momentum = (float)rule->beta1;
    plan->undamped = (float)(1.0 - rule->beta2);
    plan->first_step = step <= 1.0;
}

static enum hs_format format_at(int64_t formats, int place) { return (enum hs_format)(formats >> (4 * place) & 15); }

static int known(const struct plan *plan, const struct hs_rule *rule) {
    const int wanted = rule->kind == HS_ADAM ? 2 + (rule->amsgrad != 0) : rule->kind == HS_LION;
    const int half = plan->parameter == HS_BF16 || plan->parameter == HS_FP16;
    if (plan->parameter != HS_FP32 && !half) return 0;
    if (plan->gradient < HS_FP32 || plan->gradient > HS_FP16) return 0;
    if (half && plan->kept != HS_ABSENT && plan->kept != HS_FP32 && plan->kept != HS_INT16 && plan->kept != HS_INT8 &&
        plan->kept != plan->parameter)
        return 0;
    for (int i = 0; i < HS_STATES; i++) {
        const enum hs_format eight = rule->kind == HS_ADAM && i > 0 ? HS_UINT8 : HS_INT8;
        const enum hs_format format = plan->states[i];
        if (format != HS_ABSENT && format != HS_FP32 && format != HS_BF16 && format != eight) return 0;
        if (format == eight && !plan->job.scales[i] && plan->job.numel) return 0;
        if (rule->kind == HS_SGD ? i > 0 && format : (i < wanted) != (format != HS_ABSENT)) return 0;
    }
    return 1;
}

static void set_formats(struct plan *plan, const struct hs_job *job) {
    plan->job = *job;
    plan->parameter = format_at(job->formats, 0);
    plan->gradient = format_at(job->formats, 1);
    plan->kept = format_at(job->formats, 2);
    int grouped = 0;
    for (int i = 0; i < HS_STATES; i++) {
        plan->states[i] = format_at(job->formats, 3 + i);
        grouped |= plan->states[i] == HS_INT8 || plan->states[i] == HS_UINT8;
    }
    plan->row = grouped && job->row % GROUP ? job->row : job->numel;
}

static void choose(struct plan *plan) {
    const hs_segment fused = hs_fused_adam(plan);
    hs_segment wide = hs_wide_adam(plan);
    if (!wide) wide = hs_wide_adam_8bit(plan);
    if (!wide) wide = hs_adam_8bit(plan); /* the same bits on other processors */
    if (!wide) wide = hs_wide_momentum(plan);
    plan->rare = fused ? fused : hs_segment_general;
    plan->segment = wide ? wide : plan->rare;
}

/* Everything about one job but its elements; the step is not yet counted. */
static int set_plan(struct plan *plan, const struct hs_job *job, const struct hs_rule *rule, float coefficient) {
    set_formats(plan, job);
    if (!known(plan, rule)) return 0;
    const int64_t step = (int64_t)(*job->step + 1.0f);
    set_scalars(plan, rule, (double)step);
    plan->kind = (enum hs_kind)rule->kind;
    plan->amsgrad = rule->amsgrad;
    plan->nesterov = rule->nesterov;
    plan->coefficient = rule->maximize ? -coefficient : coefficient;
    plan->unscale = rule->unscale && coefficient != 1.0f && plan->gradient != HS_FP16;
    const int drops = plan->kept == HS_ABSENT || plan->kept == HS_INT8;
    plan->dithered = rule->stochastic && drops && plan->parameter != HS_FP32;
    const uint32_t seed = (uint32_t)job->seed, ordinal = (uint32_t)job->ordinal, first = (uint32_t)job->first;
    plan->weight_noise = stream_of(seed, ordinal, first, 0, step);
    for (int i = 0; i < HS_STATES; i++) plan->state_noise[i] = stream_of(seed, ordinal, first, (uint32_t)i + 1, step);
    choose(plan);
    return 1;
}

static int64_t piece_for(int64_t elements, int32_t threads) {
    const int64_t fair = elements / (PIECES * (threads > 1 ? threads : 1));
    return (fair < SMALLEST ? SMALLEST : fair > LARGEST ? LARGEST : fair) / GROUP;
}

int32_t hs_update(const struct hs_job *jobs, int64_t count, const struct hs_rule *rule, const float *coefficient,
                  const float *found_inf, int32_t threads) {
    if (found_inf && *found_inf != 0.0f) return HS_DONE;
    struct plan *plans = malloc((size_t)(count ? count : 1) * sizeof *plans);
    if (!plans) return HS_NO_MEMORY;
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!set_plan(&plans[i], &jobs[i], rule, coefficient ? *coefficient : 1.0f)) {
            free(plans);
            return HS_UNKNOWN_FORMAT;
        }
        elements += jobs[i].numel;
    }
    if (threads > elements / WORTH + 1) threads = (int32_t)(elements / WORTH + 1);
    struct shared shared = {plans, count, piece_for(elements, threads), 0, 0};
    for (int64_t i = 0; i < count; i++) {
        plans[i].first_piece = shared.pieces;
        shared.pieces += (groups_in_row(&plans[i]) * rows_of(&plans[i]) + shared.piece - 1) / shared.piece;
    }
    for (int64_t i = 0; i < count; i++) *jobs[i].step += 1.0f; /* only now: a refused table changes nothing */
    hs_run(threads, do_pieces, &shared);
    free(plans);
    return HS_DONE;
}

int32_t hs_version(void) { return HS_VERSION; }

void hs_sizes(int64_t sizes[4]) {
    sizes[0] = sizeof(struct hs_job);
    sizes[1] = sizeof(struct hs_rule);
    sizes[2] = sizeof(struct hs_gradient);
    sizes[3] = sizeof(struct hs_pair);
}
