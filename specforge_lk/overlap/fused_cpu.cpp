// The two passes of the overlap operation over one row of logits, fused for CPUs. The interface
// is contract.Kernels; fused_cpu.py compiles this file and calls it. Vectors are the compiler's
// own (GCC and Clang), so the same source serves AVX2, AVX-512 and NEON.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

constexpr float FLOOR = -1e30f;     // stands for a logit of -inf, as in contract.py
constexpr float TOO_LITTLE = 1e-30f;  // overlap or coverage: such rows are taken in double
constexpr int64_t BLOCK = 1024;     // elements summed in float before they are added in double

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };

// ------------------------------------------------------------------------------- vectors

inline Floats splat(float x) { return Floats{} + x; }

inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// The greater and the lesser, and b where either is nan. GCC does not find AVX's by itself.
#if defined(__AVX__) && !defined(__AVX512F__)
inline Floats max(Floats a, Floats b) { return __builtin_ia32_maxps256(a, b); }
inline Floats min(Floats a, Floats b) { return __builtin_ia32_minps256(a, b); }
#else
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
#endif

inline Floats floored(Floats x) { return max(splat(FLOOR), x); }

inline double sum(Floats x) {
    double total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

// 2^x for x <= 127, 0 below -126, where it would be denormal. x = n + f with n whole and |f| <=
// 1/2; the polynomial in f is minimax, of relative error 7.5e-8, in Estrin's form: its short
// chain of dependent operations is what bounds the speed of the loops below. 2^n is a factor, not
// a number added to the exponent's bits: any nan stays one.
inline Floats exp2(Floats x) {
    const float magic = 12582912.0f + 127;  // 1.5 * 2^23: n + 127 ends up in the low bits
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic), f2 = f * f;
    const Floats low = f * 6.931469671e-01f + 1.000000072e+00f;
    const Floats middle = f * 5.550713273e-02f + 2.402211972e-01f;
    const Floats high = f * 1.327647199e-03f + 9.675541334e-03f;
    const Floats y = (high * f2 + middle) * f2 + low;
    return x < -126.0f ? Floats{} : y * (Floats)((Ints)shifted << 23);
}

constexpr float LOG2_E = 1.44269504f;

// exp(x - shift) up to a factor near 1. A fused multiply-add subtracts and scales in one operation
// with one rounding: the shift in base 2 is rounded to a float, and the factor undoes the rounding.
// Without one the product would be rounded at the size of x, not of x - shift, so there the
// difference comes first.
struct Shift {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
    float in_base_2;
    double factor;

    explicit Shift(double shift)
        : in_base_2(shift * LOG2_E), factor(std::exp2(in_base_2 - shift * LOG2_E)) {}
    Floats exponent(Floats x) const { return x * LOG2_E - in_base_2; }
#else
    float rounded;
    double factor;

    explicit Shift(double shift) : rounded(shift), factor(std::exp(rounded - shift)) {}
    Floats exponent(Floats x) const { return (x - rounded) * LOG2_E; }
#endif
    Floats exp(Floats x) const { return exp2(exponent(x)); }
    // For shifts that may be far from the greatest x: the result stays finite.
    Floats bounded_exp(Floats x) const { return exp2(min(splat(127.0f), exponent(x))); }
};

// ---------------------------------------------------------------------- rows in and out

inline Floats from_bfloat16(Shorts x) {
    return (Floats)(__builtin_convertvector(x, Ints) << 16);
}

inline Shorts to_bfloat16(Floats x) {  // to nearest, ties to even
    const Ints bits = (Ints)x;
    const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : Ints{} + 0x7fc0, Shorts);
}

#ifdef __FLT16_MAX__
typedef _Float16 Halves __attribute__((vector_size(2 * LANES)));

inline Floats from_float16(Shorts x) { return __builtin_convertvector((Halves)x, Floats); }
inline Shorts to_float16(Floats x) { return (Shorts) __builtin_convertvector(x, Halves); }
#else
inline Floats from_float16(Shorts) { __builtin_trap(); }
inline Shorts to_float16(Floats) { __builtin_trap(); }
#endif

template <int DTYPE>
void widen(const uint16_t* from, int64_t V, float* to) {
    Shorts x = {};
    // The size of a copy is a constant where it is an instruction, not a call.
    const auto widened = [&] { return DTYPE == BFLOAT16 ? from_bfloat16(x) : from_float16(x); };
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES) {
        std::memcpy(&x, from + i, sizeof x);
        store(to + i, widened());
    }
    if (i == V) return;
    std::memcpy(&x, from + i, (V - i) * sizeof(uint16_t));
    store(to + i, widened());
}

template <int DTYPE>
void narrow(const float* from, int64_t V, char* to) {
    const auto narrowed = [&](int64_t i) {
        const Floats x = load(from + i);
        return DTYPE == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
    };
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES) {
        const Shorts x = narrowed(i);
        std::memcpy(to + i * sizeof(uint16_t), &x, sizeof x);
    }
    if (i == V) return;
    const Shorts x = narrowed(i);
    std::memcpy(to + i * sizeof(uint16_t), &x, (V - i) * sizeof(uint16_t));
}

// Logits of one row as floats, V rounded up to whole vectors with the floor: such tokens have
// probability 0 and change no sum. `buffer` is used where the row cannot be read in place.
const float* read_row(const char* logits, int dtype, int64_t offset, int64_t V, float* buffer) {
    const int64_t whole = V / LANES * LANES;
    if (dtype == FLOAT32) {
        const float* row = reinterpret_cast<const float*>(logits) + offset;
        if (whole == V) return row;
        std::memcpy(buffer, row, V * sizeof(float));
    } else {
        const uint16_t* row = reinterpret_cast<const uint16_t*>(logits) + offset;
        dtype == BFLOAT16 ? widen<BFLOAT16>(row, V, buffer) : widen<FLOAT16>(row, V, buffer);
    }
    for (int64_t i = V; i < whole + LANES; ++i) buffer[i] = FLOOR;
    return buffer;
}

void write_row(char* to, int dtype, int64_t V, const float* row) {
    if (dtype == FLOAT32)
        std::memcpy(to, row, V * sizeof(float));
    else
        dtype == BFLOAT16 ? narrow<BFLOAT16>(row, V, to) : narrow<FLOAT16>(row, V, to);
}

constexpr char NOWHERE = 0;

// A row that is read after this one. Memory is the slower part of the work on a row: the next one
// is asked for while the arithmetic goes on. Where there is none, one byte is asked for again and
// again, which costs nothing; an address that is not mapped would cost a walk of the page tables.
struct Ahead {
    uintptr_t row = uintptr_t(&NOWHERE);
    int64_t size = 0;  // bytes of an element

    void fetch(int64_t i) const {
        __builtin_prefetch(reinterpret_cast<const void*>(row + i * size), 0, 2);
    }
};

struct Next {
    Ahead z, y;
};

// ----------------------------------------------------------------------------- one row

struct Statistics {  // contract.RowStatistics, in its order, without draft_argmax
    float kl, alpha, log_alpha, reverse_kl, draft_shift, draft_log_sum;
    float log_z;  // log_normalizer
    float target_log_sum, below;
};
constexpr int TERMS = sizeof(Statistics) / sizeof(float);

struct Gradients {  // contract.RowGradients
    float kl, log_alpha, reverse_kl, log_q;
};

// q < p where y - z is above this.
inline float threshold(const Statistics& s) {
    return double(s.log_z) - (double(s.draft_shift) + double(s.draft_log_sum));
}

// Rows that floats are not enough for, or without a draft logit above the floor. False for nan,
// which is to show.
inline bool needs_care(const Statistics& s) {
    return s.alpha <= TOO_LITTLE || s.target_log_sum <= std::log(TOO_LITTLE) ||
           s.draft_shift <= FLOOR;
}

// The forward pass in double and in the log domain.
void forward_careful(const float* z, const float* y, int64_t V, Statistics& s) {
    const double t = threshold(s), log_sum = double(s.draft_shift) + s.draft_log_sum;
    const float log_z = s.log_z;
    double y_max = FLOOR, top = 2.0 * FLOOR;
    for (int64_t i = 0; i < V; ++i) {
        const double zi = z[i] < FLOOR ? FLOOR : z[i], yi = y[i] < FLOOR ? FLOOR : y[i];
        y_max = std::fmax(y_max, yi);
        top = std::fmax(top, std::fmin(yi - log_z, zi - log_sum));
    }
    if (y_max == FLOOR || log_z == INFINITY) {  // no coverage, nothing to gain
        s = Statistics{};
        s.target_log_sum = -INFINITY;
        return;
    }
    double p_sum = 0, kl = 0, reverse = 0, overlap = 0, below = 0;
    for (int64_t i = 0; i < V; ++i) {
        const double zi = z[i] < FLOOR ? FLOOR : z[i], yi = y[i] < FLOOR ? FLOOR : y[i];
        const double r = (yi - zi) - t, log_p = yi - log_z, log_q = zi - log_sum;
        const double p = std::exp(yi - y_max), share = std::exp((r < 0 ? log_p : log_q) - top);
        p_sum += p;
        kl += p * r;
        reverse -= std::exp(log_q) * r;
        overlap += share;
        below += share * (r > 0 ? 1 : r == 0 ? 0.5 : 0);
    }
    s.target_log_sum = y_max - log_z + std::log(p_sum);
    s.kl = kl / p_sum - s.target_log_sum;
    s.reverse_kl = reverse;
    s.log_alpha = top + std::log(overlap);
    s.alpha = std::exp(double(s.log_alpha));
    s.below = below / overlap;
}

void backward_careful(const float* z, const float* y, int64_t V, const Statistics& s,
                      const Gradients& g, const Next&, float* grad) {
    const double t = threshold(s);
    for (int64_t i = 0; i < V; ++i) {
        const double zi = z[i] < FLOOR ? FLOOR : z[i], yi = y[i] < FLOOR ? FLOOR : y[i];
        const double r = (yi - zi) - t, log_q = (zi - s.draft_shift) - double(s.draft_log_sum);
        const double q = std::exp(log_q), p = std::exp(yi - s.log_z - double(s.target_log_sum));
        const double w = r > 0 ? 1 : r == 0 ? 0.5 : 0;
        const double share = w == 0 ? 0 : w * std::exp(std::fmin(log_q - s.log_alpha, 0));
        grad[i] = g.kl * (q - p) + g.log_alpha * (share - q * s.below) - g.log_q * q;
        if (g.reverse_kl) grad[i] -= g.reverse_kl * q * (r + s.reverse_kl);
    }
}

float highest(Floats x) {
    float top = x[0];
    for (int i = 1; i < LANES; ++i) top = std::max(top, x[i]);
    return top;
}

// The highest logit that is no nan, and where the block starts that has it first.
struct Highest {
    float logit = FLOOR;
    int64_t block = 0;

    // Its first index; 0 if nothing is above the floor.
    int64_t index(const float* z, int64_t V) const {
        if (logit > FLOOR)
            for (int64_t i = block; i < V; ++i)
                if (z[i] == logit) return i;
        return 0;
    }
};

// exps[i] = exp(z[i] - shift) up to the Shift's factor; returns their sum with it. Finds the
// highest logit on the way: one operation more to a vector.
double exponentials(const float* z, int64_t V, const Shift& shift, float* exps, Highest& found,
                    const Ahead& ahead) {
    double total = 0;
    found = Highest{};
    for (int64_t block = 0; block < V; block += BLOCK) {
        Floats part = {}, tops = splat(FLOOR);
        for (int64_t i = block; i < std::min(V, block + BLOCK); i += LANES) {
            const Floats zi = load(z + i), e = shift.bounded_exp(zi);
            store(exps + i, e);
            ahead.fetch(i);
            part += e;
            tops = max(zi, tops);
        }
        total += sum(part);
        if (const float top = highest(tops); top > found.logit) found = {top, block};
    }
    return total * shift.factor;
}

// The terms, from q = scale * exps. FULL: with reverse KL, and right for logits of -inf, of which
// the sum of p log(p / q) would make nan.
template <bool FULL>
void overlap(const float* z, const float* y, int64_t V, const float* exps, double scale,
             const Ahead& ahead, Statistics& s) {
    const float t = threshold(s);
    const Shift normalizer(s.log_z);
    double p_sum = 0, p_below = 0, q_below = 0, q_tied = 0, kl = 0, reverse = 0;
    for (int64_t block = 0; block < V; block += BLOCK) {
        Floats all = {}, ps = {}, qs = {}, ties = {}, kls = {}, reverses = {};
        for (int64_t i = block; i < std::min(V, block + BLOCK); i += LANES) {
            const Floats yi = load(y + i), zi = load(z + i), q = load(exps + i);
            const Floats r = FULL ? (floored(yi) - floored(zi)) - t : (yi - zi) - t;
            const Floats p = normalizer.bounded_exp(yi);
            ahead.fetch(i);
            all += p;
            kls += p * r;
            qs += r > 0.0f ? q : Floats{};
            ps += r > 0.0f ? Floats{} : p;
            ties += r == 0.0f ? q : Floats{};
            if (FULL) reverses += q * float(scale) * r;
        }
        p_sum += sum(all);
        kl += sum(kls);
        q_below += sum(qs) * scale;
        p_below += sum(ps);
        q_tied += sum(ties) * scale;
        reverse -= sum(reverses);
    }
    s.target_log_sum = std::log(p_sum * normalizer.factor);
    s.kl = kl / p_sum - s.target_log_sum;
    s.alpha = q_below + p_below * normalizer.factor;
    s.log_alpha = std::log(s.alpha);
    s.below = (q_below + 0.5 * q_tied) / s.alpha;
    s.reverse_kl = reverse;
}

// The sum of exp(x - top): any shift near the maximum does. That of the first block saves a pass,
// unless a later logit is so much higher that the sum overflows. The sum is 0 if nothing is above
// the floor.
struct Normalizer {
    float top;
    double total;
    Highest found;

    Normalizer(const float* x, int64_t V, float* exps, const Ahead& ahead = {}) {
        Floats tops = splat(FLOOR);
        for (int64_t i = 0; i < std::min(V, BLOCK); i += LANES) tops = max(load(x + i), tops);
        top = highest(tops);
        total = exponentials(x, V, Shift(top), exps, found, ahead);
        if (!(total < 1e30)) {
            top = found.logit;
            total = exponentials(x, V, Shift(top), exps, found, Ahead());
        }
    }
    double log_sum() const { return top + std::log(total); }
};

// z and y hold V logits and then the floor up to a whole vector; `exps` has room for as many.
// log_z may be none. Returns the first index of the highest draft logit.
int64_t forward_row(const float* z, const float* y, int64_t V, const float* log_z, bool reverse_kl,
                    float* exps, const Next& next, Statistics& s) {
    if (log_z) {
        s.log_z = *log_z;
    } else {
        const Normalizer target(y, V, exps);
        s.log_z = target.total == 0 ? INFINITY : target.log_sum();
    }
    const Normalizer draft(z, V, exps, next.z);
    const int64_t argmax = draft.found.index(z, V);
    if (draft.total == 0 || s.log_z == INFINITY) {
        s.draft_shift = FLOOR;
        s.draft_log_sum = std::log(double(V));
        forward_careful(z, y, V, s);
        return argmax;
    }
    // The log-sum-exp as a float and the rest of it: q loses no digits where logits are large.
    const double log_sum = draft.log_sum();
    s.draft_shift = log_sum;
    s.draft_log_sum = log_sum - s.draft_shift;
    const double scale = Shift(draft.top).factor / draft.total;
    if (!reverse_kl) overlap<false>(z, y, V, exps, scale, next.y, s);
    if (reverse_kl || !std::isfinite(s.kl))
        overlap<true>(z, y, V, exps, scale, reverse_kl ? next.y : Ahead(), s);
    if (needs_care(s)) forward_careful(z, y, V, s);
    return argmax;
}

template <bool REVERSE>
void backward_row(const float* z, const float* y, int64_t V, const Statistics& s,
                  const Gradients& g, const Next& next, float* grad) {
    const float t = threshold(s);
    const Shift draft(s.draft_shift), normalizer(s.log_z);
    const double scale = std::exp(-double(s.draft_log_sum)) * draft.factor;
    const float of_p = g.kl * std::exp(-double(s.target_log_sum)) * normalizer.factor;
    const double of_kl_and_overlap = g.kl - double(g.log_alpha) * s.below;
    const double of_reverse_kl = REVERSE ? double(g.reverse_kl) * s.reverse_kl : 0;
    const double of_q = of_kl_and_overlap - of_reverse_kl - g.log_q;
    const double of_w = double(g.log_alpha) / s.alpha;
    const Floats above = splat(of_q * scale), tied = splat((of_q + 0.5 * of_w) * scale);
    const Floats below = splat((of_q + of_w) * scale);
    const float of_reverse = g.reverse_kl * scale;
    for (int64_t i = 0; i < V; i += LANES) {
        const Floats yi = load(y + i), zi = load(z + i);
        const Floats r = REVERSE ? floored(yi) - floored(zi) : yi - zi;
        Floats factor = r > t ? below : above;
        factor = r == t ? tied : factor;
        if (REVERSE) factor -= of_reverse * (r - t);
        next.z.fetch(i);
        next.y.fetch(i);
        store(grad + i, draft.exp(zi) * factor - normalizer.bounded_exp(yi) * of_p);
    }
}

// ---------------------------------------------------------------------------- all rows

// Row i of N has its logits at z + z_offsets[i] and y + y_offsets[i], counted in elements. Rows
// outside the mask are not read. There may be no log_z, where y is the target's full vocabulary,
// and no tokens.
struct Inputs {
    const char *z, *y;
    const bool* mask;
    const int64_t *z_offsets, *y_offsets;
    const float* log_z;
    const int64_t* tokens;
    int64_t N, V;
    int32_t z_dtype, y_dtype, threads;
};

Next after(const Inputs& in, int64_t i) {
    // Longer rows than this and the next ones do not fit in a cache together.
    if (i + 1 == in.N || !in.mask[i + 1] || in.V > 1 << 16) return {};
    const int64_t z = in.z_dtype == FLOAT32 ? 4 : 2, y = in.y_dtype == FLOAT32 ? 4 : 2;
    return {{uintptr_t(in.z + in.z_offsets[i + 1] * z), z},
            {uintptr_t(in.y + in.y_offsets[i + 1] * y), y}};
}

// Calls work(row, buffers) for every row on several threads; buffers hold a row each. A thread
// takes rows of several huge pages at a time: two that touch a new page together both clear it.
// False if there is no memory for the buffers; with fewer threads than asked for it does.
template <class Work>
bool for_each_row(const Inputs& in, const Work& work) {
    const int64_t several_pages = (int64_t(4) << 20) / (in.V * 4) + 1;
    const int64_t grain = std::min(several_pages, in.N / (4 * in.threads) + 1);
    // A page between the threads' buffers: they share no cache line.
    const int64_t row = in.V + LANES, each = 3 * row + 1024;
    std::vector<float> memory;
    std::vector<std::thread> others;
    try {
        memory.resize(each * in.threads);
        others.reserve(in.threads);
    } catch (const std::bad_alloc&) {
        return false;
    }
    std::atomic<int64_t> next{0};
    const auto run = [&](float* own) {
        float* const buffers[] = {own, own + row, own + 2 * row};
        for (int64_t first; (first = next.fetch_add(grain)) < in.N;)
            for (int64_t i = first; i < std::min(first + grain, in.N); ++i) work(i, buffers);
    };
    try {
        for (int i = 1; i < in.threads && i * grain < in.N; ++i)
            others.emplace_back(run, memory.data() + i * each);
    } catch (const std::system_error&) {
    }
    run(memory.data());
    for (auto& thread : others) thread.join();
    return true;
}

// A gradient is memory that nobody has touched yet: in pages of 4 KiB the kernel would take longer
// to supply it than all the arithmetic takes.
void prefer_huge_pages(char* start, int64_t bytes) {
#if defined(__linux__)
    const uintptr_t huge = uintptr_t(2) << 20, first = (uintptr_t(start) + huge - 1) & ~(huge - 1);
    const uintptr_t end = (uintptr_t(start) + bytes) & ~(huge - 1);
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

}  // namespace

// All return false, having done nothing, if memory is short.

// statistics: [9, N] of contract.RowStatistics, zeros; argmax: [N], zeros, its draft_argmax.
extern "C" bool overlap_forward(const Inputs* in, int32_t reverse_kl, float* statistics,
                                int64_t* argmax) {
    return for_each_row(*in, [=](int64_t i, float* const* buffers) {
        if (!in->mask[i]) return;
        Statistics s;
        const int64_t at =
            forward_row(read_row(in->z, in->z_dtype, in->z_offsets[i], in->V, buffers[0]),
                        read_row(in->y, in->y_dtype, in->y_offsets[i], in->V, buffers[1]), in->V,
                        in->log_z ? in->log_z + i : nullptr, reverse_kl, buffers[2],
                        after(*in, i), s);
        if (s.target_log_sum != -INFINITY) argmax[i] = at;
        float values[TERMS];
        std::memcpy(values, &s, sizeof s);
        for (int k = 0; k < TERMS; ++k) statistics[k * in->N + i] = values[k];
    });
}

// gradients: [4, N] of contract.RowGradients; grad: [N, V] in z's dtype, which may be z.
extern "C" bool overlap_backward(const Inputs* in, const float* statistics,
                                 const float* gradients, char* grad) {
    const int64_t N = in->N, V = in->V, size = in->z_dtype == FLOAT32 ? 4 : 2;
    prefer_huge_pages(grad, N * V * size);
    return for_each_row(*in, [=](int64_t i, float* const* buffers) {
        char* const row = grad + i * V * size;
        if (!in->mask[i]) {
            std::memset(row, 0, V * size);
            return;
        }
        float values[TERMS];
        for (int k = 0; k < TERMS; ++k) values[k] = statistics[k * N + i];
        Statistics s;
        std::memcpy(&s, values, sizeof s);
        const Gradients g = {gradients[i], gradients[N + i], gradients[2 * N + i],
                             gradients[3 * N + i]};
        const auto backward = needs_care(s)  ? backward_careful
                              : g.reverse_kl ? backward_row<true>
                                             : backward_row<false>;
        const bool direct = in->z_dtype == FLOAT32 && V % LANES == 0;
        float* const out = direct ? reinterpret_cast<float*>(row) : buffers[2];
        backward(read_row(in->z, in->z_dtype, in->z_offsets[i], V, buffers[0]),
                 read_row(in->y, in->y_dtype, in->y_offsets[i], V, buffers[1]), V, s, g,
                 after(*in, i), out);
        if (in->tokens && in->tokens[i] >= 0) out[in->tokens[i]] += g.log_q;
        if (!direct) write_row(row, in->z_dtype, V, out);
    });
}

// Of the target `y` alone, all its N rows: log_z, the first index of the highest logit, and of the
// tokens `kept` the logits in y's dtype, [N, count], and the log coverage. Without tokens none of
// these two is written.
extern "C" bool overlap_target(const Inputs* in, const int32_t* kept, int64_t count, char* logits,
                               float* log_z, float* log_coverage, int64_t* argmax) {
    return for_each_row(*in, [=](int64_t i, float* const* buffers) {
        float* const exps = buffers[1];
        const float* y = read_row(in->y, in->y_dtype, in->y_offsets[i], in->V, buffers[0]);
        const Normalizer target(y, in->V, exps);
        argmax[i] = target.found.index(y, in->V);
        log_z[i] = target.total == 0 ? INFINITY : target.log_sum();
        if (!kept) return;
        const int64_t size = in->y_dtype == FLOAT32 ? 4 : 2;
        const char* const from = in->y + in->y_offsets[i] * size;
        char* const to = logits + i * count * size;
        double mass = 0;
        for (int64_t k = 0; k < count; ++k) {
            std::memcpy(to + k * size, from + kept[k] * size, size);
            mass += exps[kept[k]];
        }
        mass *= Shift(target.top).factor;
        double log_mass = std::log(mass) - std::log(target.total);
        if (!(mass > TOO_LITTLE * target.total)) {  // floats are not enough, or nan
            double top = FLOOR, sum = 0;
            for (int64_t k = 0; k < count; ++k) top = std::fmax(top, y[kept[k]]);
            for (int64_t k = 0; k < count; ++k) sum += std::exp(y[kept[k]] - top);
            log_mass = top == FLOOR ? -INFINITY : top + std::log(sum) - target.log_sum();
        }
        log_coverage[i] = log_mass > 0 ? 0 : log_mass;
    });
}

extern "C" int overlap_has_float16() {
#ifdef __FLT16_MAX__
    return 1;
#else
    return 0;
#endif
}
