// The selective scan on a CPU, forward and backward, in float32. NOTES.md gives the derivation.
//
// Channels stand in vector lanes; a block is one vector of channels. A task walks one row (or document) and a slice of
// blocks, chunk by chunk: within a chunk it takes a few states at a time, so that they stay in registers and what the
// backward recomputes stays in the first-level cache. CHUNK is given by the compiler's command line.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int GROUP = 4;     // states walked together
constexpr int UNIT = 8;      // blocks whose gradients of B and C are summed together
constexpr int SLICE = 32;    // most blocks of one task: the wider, the fewer pages memory is read from
constexpr int STATES = 256;  // most states per channel
constexpr int ROOM = UNIT * STATES;  // most blocks x states of one task
constexpr int STRIPES = 16;  // most groups of rows whose gradients of A, D and the bias are summed apart

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline Vec all(float x) { return x - Vec{}; }

inline Vec load(const float* p, int lanes = LANES) {
    Vec v{};
    if (lanes == LANES) std::memcpy(&v, p, sizeof v);
    else std::memcpy(&v, p, lanes * sizeof(float));
    return v;
}

inline void store(float* p, Vec v, int lanes = LANES) {
    if (lanes == LANES) std::memcpy(p, &v, sizeof v);
    else std::memcpy(p, &v, lanes * sizeof(float));
}

// Sums of neighbouring lanes: of a, then of b.
inline Vec pairs(Vec a, Vec b) {
#if defined(__clang__)
    Vec sums;
    for (int i = 0; i < LANES / 2; ++i) sums[i] = a[2 * i] + a[2 * i + 1], sums[i + LANES / 2] = b[2 * i] + b[2 * i + 1];
    return sums;
#else
    Ints even;
    for (int i = 0; i < LANES; ++i) even[i] = 2 * i;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#endif
}

// Lane i of the result is the sum of all lanes of v[i].
template <int COUNT = LANES>
inline Vec sums(const Vec* v) {
    if constexpr (COUNT == 1) return *v;
    else return pairs(sums<COUNT / 2>(v), sums<COUNT / 2>(v + COUNT / 2));
}

// 2^(k + r), k an integer, r within half of zero: exactly 1 at 0, to 1e-7 elsewhere.
inline Vec power(Vec k, Vec r) {
    Vec p = 0.00015353361959569156f * r + 0.0013398873852565885f;
    p = p * r + 0.00961843691766262f;
    p = p * r + 0.055503323674201965f;
    p = p * r + 0.24022647738456726f;
    p = p * r + 0.6931471824645996f;
    p = p * r + 1.f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
    return p * (Vec)(((Ints)(k + 12582912.f) - 0x4B400000 + 127) << 23);  // a product, so that NaN stays NaN
#endif
}

// 2^x. NaN stays NaN; below 2^-126 it is 0 or nearly.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const Vec r = (Vec)_mm512_reduce_ps((__m512)x, 8);
    return power(x - r, r);
#else
    x = x < -126.f ? all(-126.f) : x;
    x = x > 127.f ? all(127.f) : x;
    const Vec k = (x + 12582912.f) - 12582912.f;  // 1.5 * 2^23: rounds to an integer
    return power(k, x - k);
#endif
}

constexpr float LOG2E = 1.4426950408889634f;

// e^x: the rounding of x log2(e) is made good, which exp2(x * LOG2E) would multiply by x.
inline Vec exp(Vec x) {
    x = x < -87.f ? all(-87.f) : x;  // beyond, k would not fit an exponent
    x = x > 87.f ? all(87.f) : x;
    const Vec k = (x * LOG2E + 12582912.f) - 12582912.f;
    return power(k, ((x - k * 0.693359375f) + k * 2.12194440e-4f) * LOG2E);  // ln 2 in two parts, k times the first exact
}

struct Sum {  // compensated: terms of a long row come one by one
    Vec value{}, lost{};
    void add(Vec term) {
        const Vec rest = term - lost, total = value + rest;
        lost = (total - value) - rest;
        value = total;
    }
};

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

// max(x, 0) + log(1 + e), e = exp(-|x|); the logarithm is 2 artanh(e / (2 + e)), so small e loses nothing.
inline Vec softplus(Vec x) {
    const Vec e = exp(x < 0.f ? x : -x), s = e / (2.f + e), q = s * s;
    Vec p = 0.2817833423614502f * q + 0.27960601449012756f;
    p = p * q + 0.40024909377098083f;
    p = p * q + 0.6666631698608398f;
    p = p * q + 2.f;
    return (x < 0.f ? Vec{} : x) + s * p;
}

struct Tokens {  // [batch, time, width], width contiguous
    const float* data;
    int64_t batch, time;
    const float* at(int64_t row, int64_t t) const { return data + row * batch + t * time; }
};

struct Scan {  // what forward and backward share
    int64_t rows, time, channels, states;
    const int64_t* offsets;  // of documents in one row, or null
    Tokens x, delta, B, C, z;
    const float *A, *D, *bias, *state;
    int64_t soft;

    int64_t blocks() const { return (channels + LANES - 1) / LANES; }
    int64_t units() const { return (blocks() + UNIT - 1) / UNIT; }
    int64_t slice(int64_t groups, int64_t threads) const {  // blocks of a task, so that no thread goes without one
        int64_t width = std::clamp<int64_t>(ROOM / 2 / (UNIT * states), 1, SLICE / UNIT);
        const auto tasks = [&] { return groups * ((units() + width - 1) / width); };
        while (width > 1 && tasks() < 4 * threads && tasks() % threads) width /= 2;
        return width * UNIT;
    }
    int64_t begin(int64_t row) const { return offsets ? offsets[row] : 0; }
    int64_t length(int64_t row) const { return offsets ? offsets[row + 1] - offsets[row] : time; }
    int64_t batch(int64_t row) const { return offsets ? 0 : row; }
    // A row's first chunk: rows never overlap, and their number is known from shapes.
    int64_t chunk(int64_t row) const { return (offsets ? offsets[row] : row * time) / CHUNK + row; }
    int64_t total() const { return offsets ? time : rows * time; }
    int64_t token(int64_t row, int64_t t) const { return offsets ? t : row * time + t; }
    int lanes(int64_t block) const { return (int)std::min<int64_t>(LANES, channels - block * LANES); }
};

struct alignas(64) Scratch {
    // One more than CHUNK: blocks a power of two apart would share the few places of one cache set.
    Vec step[SLICE][CHUNK + 1], input[SLICE][CHUNK + 1], out[SLICE][CHUNK + 1];
    Vec grad_out[SLICE][CHUNK + 1], grad_step[SLICE][CHUNK + 1], grad_input[SLICE][CHUNK + 1];
    Vec before[(CHUNK + 1) * GROUP], decay[CHUNK * GROUP], grad_B[CHUNK * GROUP + LANES], grad_C[CHUNK * GROUP + LANES];
    Sum grad_D[SLICE], grad_bias[SLICE], grad_A[ROOM];
    // one per block and state
    Vec A[ROOM], rate[ROOM], state[ROOM], grad[ROOM];
};

// [channels, states] of a slice <-> one vector per block and state
void gather(const Scan& s, const float* from, int64_t first, int64_t blocks, Vec* to) {
    for (int64_t b = 0; b < blocks; ++b)
        for (int64_t n = 0; n < s.states; ++n) {
            float v[LANES] = {};
            for (int i = 0; i < s.lanes(first + b); ++i) v[i] = from[((first + b) * LANES + i) * s.states + n];
            to[b * s.states + n] = load(v);
        }
}

void scatter(const Scan& s, const Vec* from, int64_t first, int64_t blocks, float* to) {
    for (int64_t b = 0; b < blocks; ++b)
        for (int i = 0; i < s.lanes(first + b); ++i)
            for (int64_t n = 0; n < s.states; ++n)
                to[((first + b) * LANES + i) * s.states + n] = from[b * s.states + n][i];
}

void open(const Scan& s, int64_t row, int64_t first, int64_t blocks, Scratch& w) {
    gather(s, s.A, first, blocks, w.A);
    for (int64_t i = 0; i < blocks * s.states; ++i) w.rate[i] = w.A[i] * LOG2E;
    if (s.state) gather(s, s.state + row * s.channels * s.states, first, blocks, w.state);
    else std::fill(w.state, w.state + blocks * s.states, Vec{});
}

Vec raw_step(const Scan& s, int64_t row, int64_t t, int64_t block) {
    const Vec raw = load(s.delta.at(s.batch(row), t) + block * LANES, s.lanes(block));
    return s.bias ? raw + load(s.bias + block * LANES, s.lanes(block)) : raw;
}

Vec x_at(const Scan& s, int64_t row, int64_t t, int64_t block) {
    return load(s.x.at(s.batch(row), t) + block * LANES, s.lanes(block));
}

Vec z_at(const Scan& s, int64_t row, int64_t t, int64_t block) {
    return load(s.z.at(s.batch(row), t) + block * LANES, s.lanes(block));
}

Vec skip(const Scan& s, int64_t block) { return s.D ? load(s.D + block * LANES, s.lanes(block)) : Vec{}; }

// Some blocks of one row from token t on.
struct Piece {
    int64_t row, t;
    int steps;
    int64_t first, blocks;
};

// Asks for a share of what the piece `by` tokens on will read, so that it comes while this one is computed.
void ask(const Scan& s, const Piece& p, int64_t by, int64_t from, int64_t to, int64_t whole, Tokens more) {
    const int64_t begin = std::max(p.t + by + CHUNK * from / whole, s.begin(p.row));
    const int64_t end = std::min(p.t + by + CHUNK * to / whole, s.begin(p.row) + s.length(p.row));
    for (int64_t t = begin; t < end; ++t)
        for (const Tokens& tokens : {s.x, s.delta, more}) {
            if (!tokens.data) continue;
            const float* line = tokens.at(s.batch(p.row), t) + p.first * LANES;
            for (int64_t b = 0; b < p.blocks; ++b) __builtin_prefetch(line + b * LANES);
        }
}

// Step sizes, inputs of the recurrence and the skip of a piece. Time is the outer loop: memory is read in order.
void prepare(const Scan& s, const Piece& p, Scratch& w) {
    for (int i = 0; i < p.steps; ++i)
        for (int64_t b = 0; b < p.blocks; ++b) {
            const Vec raw = raw_step(s, p.row, p.t + i, p.first + b), x = x_at(s, p.row, p.t + i, p.first + b);
            const Vec step = s.soft ? softplus(raw) : raw;
            w.step[b][i] = step;
            w.input[b][i] = step * x;
            w.out[b][i] = s.D ? skip(s, p.first + b) * x : Vec{};
        }
}

// What prepare does not know: the gate of y.
void write(const Scan& s, const Piece& p, const Scratch& w, float* y) {
    for (int i = 0; i < p.steps; ++i)
        for (int64_t b = 0; b < p.blocks; ++b) {
            Vec out = w.out[b][i];
            if (s.z.data) {
                const Vec z = z_at(s, p.row, p.t + i, p.first + b);
                out = out * z * sigmoid(z);
            }
            store(y + s.token(p.row, p.t + i) * s.channels + (p.first + b) * LANES, out, s.lanes(p.first + b));
        }
}

// G states of one block over one chunk: out += C h.
template <int G>
void walk(int steps, Tokens B, Tokens C, const Vec* step, const Vec* input, const Vec* rate, Vec* state, Vec* out) {
    Vec h[G], a[G];
    for (int j = 0; j < G; ++j) h[j] = state[j], a[j] = rate[j];
    const float *b = B.data, *c = C.data;
    for (int i = 0; i < steps; ++i, b += B.time, c += C.time) {
        const Vec d = step[i], u = input[i];
        Vec y = out[i];
        for (int j = 0; j < G; ++j) {
            h[j] = exp2(d * a[j]) * h[j] + b[j] * u;
            y = c[j] * h[j] + y;
        }
        out[i] = y;
    }
    for (int j = 0; j < G; ++j) state[j] = h[j];
}

// The same, keeping the state before every step and every decay; out += C h only where the gate needs it.
template <int G, bool OUT>
void recall(int steps, Tokens B, Tokens C, const Vec* step, const Vec* input, const Vec* rate, const Vec* state,
            Vec* out, Vec* before, Vec* decay) {
    Vec h[G], a[G];
    for (int j = 0; j < G; ++j) h[j] = before[j] = state[j], a[j] = rate[j];
    const float *b = B.data, *c = C.data;
    for (int i = 0; i < steps; ++i, b += B.time, c += C.time) {
        const Vec d = step[i], u = input[i];
        Vec y = OUT ? out[i] : Vec{};
        for (int j = 0; j < G; ++j) {
            const Vec e = decay[i * G + j] = exp2(d * a[j]);
            before[(i + 1) * G + j] = h[j] = e * h[j] + b[j] * u;
            if (OUT) y = c[j] * h[j] + y;
        }
        if (OUT) out[i] = y;
    }
}

// One chunk backwards. grad: of the states after it, then of the states before it.
template <int G>
void retrace(int steps, Tokens B, Tokens C, const Vec* step, const Vec* input, const Vec* A, const Vec* before,
             const Vec* decay, const Vec* grad_out, Vec* grad, Sum* grad_A, Vec* grad_step, Vec* grad_input,
             Vec* grad_B, Vec* grad_C) {
    Vec g[G], a[G], sum_A[G];
    for (int j = 0; j < G; ++j) g[j] = grad[j], a[j] = A[j], sum_A[j] = Vec{};
    const float *b = B.data + (steps - 1) * B.time, *c = C.data + (steps - 1) * C.time;
    for (int i = steps - 1; i >= 0; --i, b -= B.time, c -= C.time) {
        const Vec d = step[i], u = input[i], dy = grad_out[i];
        Vec dd = grad_step[i], du = grad_input[i];
        for (int j = 0; j < G; ++j) {
            g[j] = c[j] * dy + g[j];
            grad_C[i * G + j] += dy * before[(i + 1) * G + j];
            grad_B[i * G + j] += g[j] * u;
            du = b[j] * g[j] + du;
            g[j] *= decay[i * G + j];
            const Vec exponent = g[j] * before[i * G + j];
            dd = exponent * a[j] + dd;
            sum_A[j] = exponent * d + sum_A[j];
        }
        grad_step[i] = dd, grad_input[i] = du;
    }
    for (int j = 0; j < G; ++j) grad[j] = g[j], grad_A[j].add(sum_A[j]);
}

// Calls f with the number of states in each group, as a constant.
template <class F>
void grouped(int64_t states, F&& f) {
    int64_t n = 0;
    for (; n + GROUP <= states; n += GROUP) f(n, std::integral_constant<int, GROUP>{});
    if (states - n == 3) f(n, std::integral_constant<int, 3>{});
    if (states - n == 2) f(n, std::integral_constant<int, 2>{});
    if (states - n == 1) f(n, std::integral_constant<int, 1>{});
}

Tokens from(Tokens tokens, int64_t row, int64_t t, int64_t n) { return {tokens.at(row, t) + n, 0, tokens.time}; }

void forward_task(const Scan& s, int64_t row, int64_t first, int64_t blocks, Scratch& w, float* y, float* last,
                  float* kept) {
    const int64_t N = s.states;
    open(s, row, first, blocks, w);
    const int64_t end = s.begin(row) + s.length(row);
    int64_t chunk = s.chunk(row);
    for (int64_t t = s.begin(row); t < end; t += CHUNK, ++chunk) {
        const Piece p{row, t, (int)std::min<int64_t>(CHUNK, end - t), first, blocks};
        if (kept) std::memcpy(kept + (chunk * s.blocks() + first) * N * LANES, w.state, blocks * N * sizeof(Vec));
        prepare(s, p, w);
        for (int64_t b = 0; b < blocks; ++b)
            grouped(N, [&](int64_t n, auto size) {
                ask(s, p, CHUNK, b * N + n, b * N + n + size, blocks * N, {});
                walk<decltype(size)::value>(
                    p.steps, from(s.B, s.batch(row), t, n), from(s.C, s.batch(row), t, n), w.step[b], w.input[b],
                    w.rate + b * N + n, w.state + b * N + n, w.out[b]);
            });
        write(s, p, w, y);
    }
    scatter(s, w.state, first, blocks, last + row * s.channels * N);
}

// One token: states stand in lanes, as memory has them, for one channel after the other of a block.
void token_task(const Scan& s, int64_t row, int64_t first, int64_t blocks, Scratch& w, float* y, float* last) {
    const Piece p{row, s.begin(row), 1, first, blocks};
    prepare(s, p, w);
    const float *B = s.B.at(s.batch(row), p.t), *C = s.C.at(s.batch(row), p.t);
    for (int64_t b = 0; b < blocks; ++b) {
        Vec parts[LANES]{};
        for (int i = 0; i < s.lanes(first + b); ++i) {
            const int64_t channel = (first + b) * LANES + i, at = (row * s.channels + channel) * s.states;
            const float step = w.step[b][0][i] * LOG2E, input = w.input[b][0][i];
            for (int64_t n = 0; n < s.states; n += LANES) {
                const int lanes = (int)std::min<int64_t>(LANES, s.states - n);
                Vec h = s.state ? load(s.state + at + n, lanes) : Vec{};
                h = exp2(step * load(s.A + channel * s.states + n, lanes)) * h + input * load(B + n, lanes);
                parts[i] = load(C + n, lanes) * h + parts[i];
                store(last + at + n, h, lanes);
            }
        }
        w.out[b][0] += sums(parts);
    }
    write(s, p, w, y);
}

struct Grads {
    Tokens y;            // upstream
    const float* last;   // upstream, or null
    const float* kept;   // states before every chunk
    float *x, *delta, *z, *state;
    float *A, *D, *bias;  // [stripes, ...], summed at the end
    float *B, *C;         // [units, tokens, states], summed at the end
};

// The upstream gradient of y through the gate; the other gradients start from nothing.
void enter(const Scan& s, const Grads& g, const Piece& p, Scratch& w) {
    for (int i = 0; i < p.steps; ++i)
        for (int64_t b = 0; b < p.blocks; ++b) {
            const int64_t block = p.first + b;
            Vec dy = load(g.y.at(s.batch(p.row), p.t + i) + block * LANES, s.lanes(block));
            if (s.z.data) {
                const Vec z = z_at(s, p.row, p.t + i, block);
                dy = dy * z * sigmoid(z);
            }
            w.grad_out[b][i] = dy;
            w.grad_step[b][i] = w.grad_input[b][i] = Vec{};
        }
}

// Gradients of the step, the input of the recurrence and y through bias, softplus, skip and gate.
void leave(const Scan& s, const Grads& g, const Piece& p, Scratch& w) {
    Vec sum_D[SLICE]{}, sum_bias[SLICE]{};
    for (int i = 0; i < p.steps; ++i)
        for (int64_t b = 0; b < p.blocks; ++b) {
            const int64_t block = p.first + b, t = p.t + i;
            const int lanes = s.lanes(block);
            const Vec x = x_at(s, p.row, t, block), du = w.grad_input[b][i], dy = w.grad_out[b][i];
            const int64_t at = s.token(p.row, t) * s.channels + block * LANES;
            Vec dx = w.step[b][i] * du, dd = w.grad_step[b][i] + x * du;
            if (s.D) {
                dx = skip(s, block) * dy + dx;
                sum_D[b] = dy * x + sum_D[b];
            }
            if (s.soft) dd *= sigmoid(raw_step(s, p.row, t, block));
            sum_bias[b] += dd;
            if (s.z.data) {
                const Vec z = z_at(s, p.row, t, block), gate = sigmoid(z);
                const Vec up = load(g.y.at(s.batch(p.row), t) + block * LANES, lanes);
                store(g.z + at, up * w.out[b][i] * (gate * (1.f + z * (1.f - gate))), lanes);
            }
            store(g.x + at, dx, lanes);
            store(g.delta + at, dd, lanes);
        }
    for (int64_t b = 0; b < p.blocks; ++b) w.grad_D[b].add(sum_D[b]), w.grad_bias[b].add(sum_bias[b]);
}

// G states of one unit: blocks from b to last of the piece.
template <int G>
void backward_unit(const Scan& s, const Grads& g, const Piece& p, int64_t b, int64_t last, int64_t n, Scratch& w) {
    const Tokens B = from(s.B, s.batch(p.row), p.t, n), C = from(s.C, s.batch(p.row), p.t, n);
    std::fill(w.grad_B, w.grad_B + p.steps * G, Vec{});
    std::fill(w.grad_C, w.grad_C + p.steps * G, Vec{});
    const int64_t unit = (p.first + b) / UNIT;
    for (; b < last; ++b) {
        const int64_t at = b * s.states + n;
        ask(s, p, -CHUNK, at, at + G, p.blocks * s.states, g.y);
        const auto again = s.z.data ? recall<G, true> : recall<G, false>;
        again(p.steps, B, C, w.step[b], w.input[b], w.rate + at, w.state + at, w.out[b], w.before, w.decay);
        retrace<G>(p.steps, B, C, w.step[b], w.input[b], w.A + at, w.before, w.decay, w.grad_out[b], w.grad + at,
                   w.grad_A + at, w.grad_step[b], w.grad_input[b], w.grad_B, w.grad_C);
    }
    const int64_t to = (unit * s.total() + s.token(p.row, p.t)) * s.states + n;
    for (int k = 0; k < p.steps * G; k += LANES) {
        const Vec B_sums = sums(w.grad_B + k), C_sums = sums(w.grad_C + k);
        for (int i = 0; i < std::min(LANES, p.steps * G - k); ++i) {
            g.B[to + (k + i) / G * s.states + (k + i) % G] = B_sums[i];
            g.C[to + (k + i) / G * s.states + (k + i) % G] = C_sums[i];
        }
    }
}

// Rows stripe, stripe + stripes, ... of some blocks, in that order.
void backward_task(const Scan& s, const Grads& g, int64_t stripe, int64_t stripes, int64_t first, int64_t blocks,
                   Scratch& w) {
    const int64_t N = s.states;
    std::fill(w.grad_A, w.grad_A + blocks * N, Sum{});
    std::fill(w.grad_D, w.grad_D + blocks, Sum{});
    std::fill(w.grad_bias, w.grad_bias + blocks, Sum{});
    for (int64_t row = stripe; row < s.rows; row += stripes) {
        open(s, row, first, blocks, w);
        if (g.last) gather(s, g.last + row * s.channels * N, first, blocks, w.grad);
        else std::fill(w.grad, w.grad + blocks * N, Vec{});
        const int64_t begin = s.begin(row), length = s.length(row);
        for (int64_t i = (length + CHUNK - 1) / CHUNK - 1; i >= 0; --i) {
            const float* kept = g.kept + ((s.chunk(row) + i) * s.blocks() + first) * N * LANES;
            std::memcpy(w.state, kept, blocks * N * sizeof(Vec));
            const int steps = (int)std::min<int64_t>(CHUNK, length - i * CHUNK);
            const Piece p{row, begin + i * CHUNK, steps, first, blocks};
            prepare(s, p, w);
            enter(s, g, p, w);
            for (int64_t b = 0; b < blocks; b += UNIT)
                grouped(N, [&](int64_t n, auto size) {
                    backward_unit<decltype(size)::value>(s, g, p, b, std::min(b + UNIT, blocks), n, w);
                });
            leave(s, g, p, w);
        }
        if (g.state) scatter(s, w.grad, first, blocks, g.state + row * s.channels * N);
    }
    for (int64_t i = 0; i < blocks * N; ++i) w.state[i] = w.grad_A[i].value;
    scatter(s, w.state, first, blocks, g.A + stripe * s.channels * N);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = stripe * s.channels + (first + b) * LANES;
        store(g.D + at, w.grad_D[b].value, s.lanes(first + b));
        store(g.bias + at, w.grad_bias[b].value, s.lanes(first + b));
    }
}

// Below 2^-126 everything is zero while this lives: arithmetic on denormals is a hundred times slower.
struct Flush {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#endif
};

Scratch* scratch() {  // of this thread, or null where memory ran out
    thread_local std::unique_ptr<Scratch> own;
    if (!own) own.reset(new (std::nothrow) Scratch);
    return own.get();
}

// f(group, first block, blocks, scratch) for every group and slice. Threads live for this call only: nothing of it can
// be lost in a fork. Fewer threads than asked for do the same work.
template <class F>
void parallel(const Scan& s, int64_t groups, int64_t threads, F&& f) {
    threads = std::clamp<int64_t>(s.total() * s.channels * s.states >> 17, 1, threads);  // each worth its start
    const int64_t slice = s.slice(groups, threads), parts = (s.blocks() + slice - 1) / slice, tasks = groups * parts;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        const Flush flush;
        Scratch* const w = scratch();
        for (int64_t i; w && (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
            const int64_t first = i % parts * slice;
            f(i / parts, first, std::min(slice, s.blocks() - first), *w);
        }
    };
    if (!scratch()) throw std::bad_alloc();
    std::vector<std::thread> others;
    others.reserve(threads);
    try {
        while ((int64_t)others.size() + 1 < std::min(threads, tasks)) others.emplace_back(work);
    } catch (const std::system_error&) {
    }
    work();
    for (auto& thread : others) thread.join();
}

// to [size] = sum of parts [count, size], in order
void fold(const float* parts, int64_t count, int64_t size, float* to) {
    for (int64_t i = 0; i < size; ++i) to[i] = parts[i];
    for (int64_t k = 1; k < count; ++k)
        for (int64_t i = 0; i < size; ++i) to[i] += parts[k * size + i];
}

Scan scan(const int64_t* sizes, const int64_t* strides, const void* const* in) {
    const auto floats = [&](int i) { return (const float*)in[i]; };
    const auto tokens = [&](int i) { return Tokens{floats(i), strides[2 * i], strides[2 * i + 1]}; };
    return {sizes[0], sizes[1], sizes[2], sizes[3], (const int64_t*)in[9], tokens(0), tokens(1), tokens(2), tokens(3),
            tokens(4), floats(5), floats(6), floats(7), floats(8), sizes[4]};
}

}  // namespace

// sizes    rows, time, channels, states, softplus, threads
// in       x, delta, B, C, z [batch, time, width] with strides (batch, time) each; A, D, bias, state contiguous; offsets
//          absent ones are null
// returns  0, or 1 where memory or threads ran out
extern "C" int scan_forward(const int64_t* sizes, const int64_t* strides, const void* const* in, float* y, float* last,
                            float* kept) try {
    const Scan s = scan(sizes, strides, in);
    parallel(s, s.rows, sizes[5], [&](int64_t row, int64_t first, int64_t blocks, Scratch& w) {
        if (s.length(row) == 1 && !kept) token_task(s, row, first, blocks, w, y, last);
        else forward_task(s, row, first, blocks, w, y, last, kept);
    });
    return 0;
} catch (...) {
    return 1;
}

// out      gradients of x, delta, B, C, z, A, D, bias, state, all contiguous; z and state may be null
extern "C" int scan_backward(const int64_t* sizes, const int64_t* strides, const void* const* in, const float* grad_y,
                             const int64_t* grad_strides, const float* grad_last, const float* kept,
                             float* const* out) try {
    const Scan s = scan(sizes, strides, in);
    const int64_t stripes = std::min<int64_t>(s.rows, STRIPES), units = s.units();
    const int64_t per_A = s.channels * s.states, per_B = s.total() * s.states;
    std::unique_ptr<float[]> room(new float[stripes * (per_A + 2 * s.channels) + 2 * units * per_B]);
    Grads g{{grad_y, grad_strides[0], grad_strides[1]}, grad_last, kept, out[0], out[1], out[4], out[8]};
    g.A = room.get(), g.D = g.A + stripes * per_A, g.bias = g.D + stripes * s.channels;
    g.B = g.bias + stripes * s.channels, g.C = g.B + units * per_B;
    parallel(s, stripes, sizes[5], [&](int64_t stripe, int64_t first, int64_t blocks, Scratch& w) {
        backward_task(s, g, stripe, stripes, first, blocks, w);
    });
    fold(g.B, units, per_B, out[2]);
    fold(g.C, units, per_B, out[3]);
    fold(g.A, stripes, per_A, out[5]);
    fold(g.D, stripes, s.channels, out[6]);
    fold(g.bias, stripes, s.channels, out[7]);
    return 0;
} catch (...) {
    return 1;
}
