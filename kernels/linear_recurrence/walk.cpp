// S_t = exp(g_t) S_{t-1} + k_t v_t', y_t = S_t' q_t: chunks of CHUNK tokens in matmul form, the states carried on.
// One task takes one row and a few heads of one group through time; a task writes where no other does, and how many
// threads share the tasks changes no bit. Plain C interface; all arrays contiguous float32 in the layouts named.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int CHUNK = 32, BLOCK = 16, ROWS = 8, SEGMENT = 32;
constexpr long STRIDE = (long)CHUNK * SEGMENT;  // tokens from one saved state to the next
constexpr double LEAST = -1e3;

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef double eight_doubles __attribute__((vector_size(64)));
typedef double eight_doubles_anywhere __attribute__((vector_size(64), aligned(8), may_alias));
typedef int index8 __attribute__((vector_size(32)));

template <int M, int N>
static inline void tile(int depth, const float* a, long am, long ak, const float* b, long ldb, float* c, long ldc,
                        bool add) {
    vec sum[M][N];
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) sum[i][j] = add ? *(const vec*)(c + i * ldc + j * LANES) : vec{};
    for (int p = 0; p < depth; p++) {
        vec row[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) row[j] = *(const vec*)(b + p * ldb + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) sum[i][j] += a[i * am + p * ak] * row[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) *(vec*)(c + i * ldc + j * LANES) = sum[i][j];
}

// c [m, n] = (c if add) + a b; a[i, p] at a + i am + p ak, b and c by rows; m is a multiple of ROWS, n of LANES
__attribute__((noinline)) static void product(int m, int n, int depth, const float* a, long am, long ak, const float* b, long ldb, float* c,
                    long ldc, bool add) {
    int j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        for (int i = 0; i < m; i += ROWS)
            tile<ROWS, 2>(depth, a + i * am, am, ak, b + j, ldb, c + i * ldc + j, ldc, add);
    for (; j < n; j += LANES)
        for (int i = 0; i < m; i += ROWS)
            tile<ROWS, 1>(depth, a + i * am, am, ak, b + j, ldb, c + i * ldc + j, ldc, add);
}

// The same with a lower triangular [CHUNK, CHUNK]: L b, or L' b
static void lower(int n, const float* l, const float* b, long ldb, float* c, long ldc, bool add) {
    for (int i = 0; i < CHUNK; i += BLOCK)
        product(BLOCK, n, i + BLOCK, l + i * CHUNK, CHUNK, 1, b, ldb, c + i * ldc, ldc, add);
}
static void lower_transposed(int n, const float* l, const float* b, long ldb, float* c, long ldc, bool add) {
    for (int j = 0; j < CHUNK; j += BLOCK)
        product(BLOCK, n, CHUNK - j, l + j * CHUNK + j, 1, CHUNK, b + j * ldb, ldb, c + j * ldc, ldc, add);
}
// The blocks on and below the diagonal of a b: [CHUNK, depth] [depth, CHUNK]
static void lower_part(int depth, const float* a, long lda, const float* b, float* c) {
    for (int i = 0; i < CHUNK; i += BLOCK)
        product(BLOCK, i + BLOCK, depth, a + i * lda, lda, 1, b, CHUNK, c + i * CHUNK, CHUNK, false);
}

// exp for x <= 0, to two units in the last place; 0 below -87, NaN for NaN
static inline float exp_negative(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23 rounds to an integer
    float n = (x * 1.44269504f + magic) - magic, r = x - n * 0.693145752f;
    r -= n * 1.42860677e-6f;
    float p = 1.98756915e-4f;
    p = p * r + 1.39819995e-3f;
    p = p * r + 8.33345186e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int bits;
    std::memcpy(&bits, &p, 4);
    bits += (int)(x > -87.0f ? n : 0.0f) << 23;
    std::memcpy(&p, &bits, 4);
    return x <= -87.0f ? 0.0f : x != x ? x : p;
}

extern "C" struct Sizes {
    long rows, tokens, groups, heads, key, value, slices;
    long decay;  // 0 none, 1 per head, 2 per head and time
    long threads;
};

namespace {

struct Task {  // where a task stands
    const Sizes& s;
    long row, group, slice, begin, end, first, last;  // tokens; heads
    long marked = 0;                                  // saved states of the rows before
    int k, v;                                         // padded sizes
    Task(const Sizes& s, const long* bounds, long index) : s(s) {
        slice = index % s.slices, index /= s.slices;
        group = index % s.groups, row = index / s.groups;
        begin = bounds[row], end = bounds[row + 1];
        long each = s.heads / s.groups;
        first = group * each + each * slice / s.slices, last = group * each + each * (slice + 1) / s.slices;
        k = (s.key + 15) / 16 * 16, v = (s.value + 15) / 16 * 16;
        for (long r = 0; r < row; r++) marked += (bounds[r + 1] - bounds[r] + STRIDE - 1) / STRIDE;
    }
    long chunks() const { return (end - begin + CHUNK - 1) / CHUNK; }
    long mark(long chunk, long head) const {
        return ((marked + chunk / SEGMENT) * s.heads + head) * s.key * s.value;
    }
    int length(long chunk) const { return (int)std::min<long>(CHUNK, end - begin - chunk * CHUNK); }
    long token(long chunk) const { return begin + chunk * CHUNK; }
    long state(long head) const { return (row * s.heads + head) * s.key * s.value; }
};

class Buffer {  // of a cache line's alignment, zero at first
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float[], Free> data;

   public:
    Buffer(size_t n) : data((float*)std::aligned_alloc(64, (4 * n + 63) / 64 * 64)) {
        if (!data) throw std::bad_alloc();
        std::memset(data.get(), 0, 4 * n);
    }
    operator float*() { return data.get(); }
};

// rows of `width` floats, `stride` apart in memory, to rows of `padded`; zeros beyond `length` and `width`
void load(float* to, const float* from, int length, long width, int padded, long stride) {
    for (int i = 0; i < CHUNK; i++) {
        long n = i < length ? width : 0;
        if (n) std::memcpy(to + i * padded, from + i * stride, 4 * n);
        if (n < padded) std::memset(to + i * padded + n, 0, 4 * (padded - n));
    }
}
// [rows, columns] -> [columns, rows], both multiples of 8; 8 by 8 in three rounds of exchanges
void transpose(float* to, const float* from, int rows, int columns) {
    for (int i = 0; i < rows; i += 8)
        for (int j = 0; j < columns; j += 8) {
            eight a[8], b[8];
            for (int n = 0; n < 8; n++) a[n] = *(const eight*)(from + (i + n) * columns + j);
            for (int n = 0; n < 8; n += 2) {
                b[n] = __builtin_shuffle(a[n], a[n + 1], index8{0, 8, 2, 10, 4, 12, 6, 14});
                b[n + 1] = __builtin_shuffle(a[n], a[n + 1], index8{1, 9, 3, 11, 5, 13, 7, 15});
            }
            for (int n : {0, 1, 4, 5}) {
                a[n] = __builtin_shuffle(b[n], b[n + 2], index8{0, 1, 8, 9, 4, 5, 12, 13});
                a[n + 2] = __builtin_shuffle(b[n], b[n + 2], index8{2, 3, 10, 11, 6, 7, 14, 15});
            }
            for (int n = 0; n < 4; n++) {
                eight low = __builtin_shuffle(a[n], a[n + 4], index8{0, 1, 2, 3, 8, 9, 10, 11});
                eight high = __builtin_shuffle(a[n], a[n + 4], index8{4, 5, 6, 7, 12, 13, 14, 15});
                *(eight*)(to + (j + n) * rows + i) = low;
                *(eight*)(to + (j + n + 4) * rows + i) = high;
            }
        }
}
// sum of a b over n, a multiple of 16: up to 8 products per lane in float, the rest in double
double dot(const float* a, const float* b, long n) {
    eight_doubles all = {};
    for (long i = 0; i < n; i += 64) {
        eight sum = {};
        for (long j = i; j < std::min(i + 64, n); j += 8) sum += *(const eight*)(a + j) * *(const eight*)(b + j);
        all += __builtin_convertvector(sum, eight_doubles);
    }
    double found = 0;
    for (int i = 0; i < 8; i++) found += all[i];
    return found;
}
void scale(float* x, const float* by, int width) {
    for (int i = 0; i < CHUNK; i++)
        for (int j = 0; j < width; j++) x[i * width + j] *= by[i];
}
void read_state(float* to, const float* from, const Task& t) {
    std::memset(to, 0, 4 * (size_t)t.k * t.v);
    for (long i = 0; from && i < t.s.key; i++) std::memcpy(to + i * t.v, from + i * t.s.value, 4 * t.s.value);
}
void write_state(float* to, const float* from, const Task& t) {
    for (long i = 0; i < t.s.key; i++) std::memcpy(to + i * t.s.value, from + i * t.v, 4 * t.s.value);
}

void scale_columns(float* x, const float* by, int height) {  // x [height, CHUNK]
    for (int i = 0; i < height; i++)
        for (int j = 0; j < CHUNK; j++) x[i * CHUNK + j] *= by[j];
}
void mask(float* m, const float* g, const float* between) {  // selects: what is masked may be anything
    for (int i = 0; i < CHUNK * CHUNK; i++) m[i] = between[i] == 0.0f ? 0.0f : g[i] * between[i];
}

struct Decay {  // of one chunk and head: since its start, until its end, over all of it, and between two tokens
    float since[CHUNK], until[CHUNK], whole, between[CHUNK * CHUNK];
    bool cut[CHUNK];  // a decay so strong that it has no gradient
    Decay(const Task& t, const float* g, long head, long chunk) {
        double sum = 0, rest = 0, step[CHUNK], total[CHUNK];
        for (int i = 0; i < CHUNK; i++) {
            double now = 0;
            if (i < t.length(chunk) && t.s.decay)
                now = t.s.decay == 1 ? g[head] : g[(t.token(chunk) + i) * t.s.heads + head];
            cut[i] = now < LEAST;
            step[i] = cut[i] ? LEAST : now;
            total[i] = sum += step[i];
        }
        float left[CHUNK];
        for (int i = CHUNK - 1; i >= 0; i--) left[i] = (float)rest, rest += step[i];
        for (int i = 0; i < CHUNK; i++) since[i] = exp_negative((float)total[i]), until[i] = exp_negative(left[i]);
        whole = since[CHUNK - 1];
        for (int i = 0; i < CHUNK; i++) {
            float* row = between + i * CHUNK;
            for (int j = 0; j < (i / BLOCK + 1) * BLOCK; j++) {
                float x = (float)(total[i] - total[j]);
                row[j] = exp_negative(x > 0.0f ? 0.0f : x);
            }
            for (int j = i + 1; j < CHUNK; j++) row[j] = 0.0f;
        }
    }
};

// S = whole S + K' diag(until) V;  `v` is scaled in place
void advance(const Task& t, const Decay& d, const float* k, float* v, float* state) {
    for (long i = 0; i < (long)t.k * t.v; i++) state[i] *= d.whole;
    scale(v, d.until, t.v);
    product(t.k, t.v, CHUNK, k, 1, t.k, v, t.v, state, t.v, true);
}

void forward_task(const Task& t, const float* q, const float* k, const float* v, const float* g, const float* start,
                  float* y, float* after, float* marks) {
    const Sizes& s = t.s;
    long qk = s.groups * s.key, hv = s.heads * s.value, size = (long)t.k * t.v;
    Buffer states((t.last - t.first) * size), Q(CHUNK * t.k), K(CHUNK * t.k), KT(CHUNK * t.k), G(CHUNK * CHUNK),
        M(CHUNK * CHUNK), V(CHUNK * t.v), Y(CHUNK * t.v);
    for (long h = t.first; h < t.last; h++)
        read_state(states + (h - t.first) * size, start ? start + t.state(h) : nullptr, t);
    for (long n = 0; n < t.chunks(); n++) {
        long at = t.token(n);
        int length = t.length(n);
        load(Q, q + at * qk + t.group * s.key, length, s.key, t.k, qk);
        load(K, k + at * qk + t.group * s.key, length, s.key, t.k, qk);
        transpose(KT, K, CHUNK, t.k);
        lower_part(t.k, Q, t.k, KT, G);
        for (long h = t.first; h < t.last; h++) {
            float* state = states + (h - t.first) * size;
            if (n % SEGMENT == 0) write_state(marks + t.mark(n, h), state, t);
            Decay d(t, g, h, n);
            load(V, v + at * hv + h * s.value, length, s.value, t.v, hv);
            mask(M, G, d.between);
            product(CHUNK, t.v, t.k, Q, t.k, 1, state, t.v, Y, t.v, false);
            scale(Y, d.since, t.v);
            lower(t.v, M, V, t.v, Y, t.v, true);
            for (int i = 0; i < length; i++)
                std::memcpy(y + (at + i) * hv + h * s.value, Y + i * t.v, 4 * s.value);
            advance(t, d, K, V, state);
        }
    }
    for (long h = t.first; h < t.last; h++) write_state(after + t.state(h), states + (h - t.first) * size, t);
}

struct Inputs {
    const float *q, *k, *v, *g, *marks, *d_y, *d_after;
};
struct Gradients {  // of q and k per slice: [slices, tokens, groups, key]; of g [rows, heads] or [tokens, heads]
    float *q, *k, *v, *g, *start;
};

// What one chunk and head give to the decay of each of its tokens
void decay_gradient(const Task& t, const Decay& d, const float* pairs, const double* far, const double* left,
                    double whole, long head, long chunk, float* out) {
    double total[CHUNK], ahead[CHUNK] = {}, sum = 0, before = whole;
    for (int i = 0; i < CHUNK; i++) {
        eight_doubles row = {};
        for (int j = 0; j < CHUNK; j += 8) {
            eight_doubles now = __builtin_convertvector(*(const eight*)(pairs + i * CHUNK + j), eight_doubles);
            row += now;
            *(eight_doubles_anywhere*)(ahead + j) += now;
        }
        total[i] = far[i];
        for (int j = 0; j < 8; j++) total[i] += row[j];
    }
    for (int i = 0; i < CHUNK; i++) total[i] -= ahead[i];
    double found[CHUNK];
    for (int i = CHUNK - 1; i >= 0; i--) found[i] = sum += total[i];
    for (int i = 0; i < t.length(chunk); i++) {
        double now = d.cut[i] ? 0.0 : found[i] + before;
        before += left[i];
        if (t.s.decay == 2) out[(t.token(chunk) + i) * t.s.heads + head] = (float)now;
        else if (t.s.decay == 1) out[t.row * t.s.heads + head] += (float)now;
    }
}

struct Segment {  // SEGMENT chunks, backwards; what heads share is computed once
    const Task& t;
    const Inputs& in;
    const Gradients& out;
    long first, count, qk, hv, size, ck, cv;
    static constexpr long cc = CHUNK * CHUNK;
    Buffer Q, QT, K, G, d_qT, d_kT, d_G, states, V;
    std::vector<Decay> decays;

    Segment(const Task& t, const Inputs& in, const Gradients& out, long first)
        : t(t), in(in), out(out), first(first), count(std::min<long>(SEGMENT, t.chunks() - first)),
          qk(t.s.groups * t.s.key), hv(t.s.heads * t.s.value), size((long)t.k * t.v), ck(CHUNK * t.k),
          cv(CHUNK * t.v), Q(count * ck), QT(count * ck), K(count * ck), G(count * cc), d_qT(count * ck), d_kT(count * ck),
          d_G(count * cc), states(count * size), V(count * cv) {
        Buffer KT(ck);
        for (long n = 0; n < count; n++) {
            long at = t.token(first + n) * qk + t.group * t.s.key;
            load(Q + n * ck, in.q + at, t.length(first + n), t.s.key, t.k, qk);
            load(K + n * ck, in.k + at, t.length(first + n), t.s.key, t.k, qk);
            transpose(KT, K + n * ck, CHUNK, t.k);
            transpose(QT + n * ck, Q + n * ck, CHUNK, t.k);
            lower_part(t.k, Q + n * ck, t.k, KT, G + n * cc);
        }
    }

    void head(long h, float* d_state) {  // d_state: of the state after the segment; becomes that of the one before it
        Buffer scaled(cv), d_y(cv), d_yT(cv), VT(cv), d_v(cv), through(cv), M(cc), d_M(cc), farT(ck);
        decays.clear();
        read_state(states, in.marks + t.mark(first, h), t);
        for (long n = 0; n < count; n++) {
            load(V + n * cv, in.v + t.token(first + n) * hv + h * t.s.value, t.length(first + n), t.s.value, t.v, hv);
            decays.emplace_back(t, in.g, h, first + n);
            if (n + 1 == count) break;
            std::memcpy(states + (n + 1) * size, states + n * size, 4 * size);
            std::memcpy(scaled, V + n * cv, 4 * cv);
            advance(t, decays[n], K + n * ck, scaled, states + (n + 1) * size);
        }
        for (long n = count - 1; n >= 0; n--) {
            const Decay& d = decays[n];
            float *Qn = Q + n * ck, *Kn = K + n * ck, *Vn = V + n * cv, *state = states + n * size;
            long at = t.token(first + n) * hv + h * t.s.value;
            int length = t.length(first + n);
            double far[CHUNK] = {}, left[CHUNK] = {}, whole = 0;
            load(d_y, in.d_y + at, length, t.s.value, t.v, hv);
            transpose(VT, Vn, CHUNK, t.v);
            lower_part(t.v, d_y, t.v, VT, d_M);
            mask(M, G + n * cc, d.between);
            lower_transposed(t.v, M, d_y, t.v, d_v, t.v, false);
            product(CHUNK, t.v, t.k, Kn, t.k, 1, d_state, t.v, through, t.v, false);
            scale(through, d.until, t.v);
            for (long i = 0; i < cv; i++) d_v[i] += through[i];
            for (int i = 0; i < length; i++)
                std::memcpy(out.v + at + i * hv, d_v + i * t.v, 4 * t.s.value);
            scale(d_y, d.since, t.v);
            transpose(d_yT, d_y, CHUNK, t.v);
            product(t.k, CHUNK, t.v, state, t.v, 1, d_yT, CHUNK, farT, CHUNK, false);
            scale_columns(VT, d.until, t.v);
            product(t.k, CHUNK, t.v, d_state, t.v, 1, VT, CHUNK, d_kT + n * ck, CHUNK, true);
            for (long i = 0; i < ck; i++) d_qT[n * ck + i] += farT[i];
            if (t.s.decay) {
                for (int i = 0; i < CHUNK; i++) left[i] = dot(through + i * t.v, Vn + i * t.v, t.v);
                for (int j = 0; j < t.k; j++)
                    for (int i = 0; i < CHUNK; i++) far[i] += (double)farT[j * CHUNK + i] * QT[n * ck + j * CHUNK + i];
                whole = dot(state, d_state, size);
                for (long i = 0; i < cc; i++) M[i] = d.between[i] == 0.0f ? 0.0f : M[i] * d_M[i];
                decay_gradient(t, d, M, far, left, whole * d.whole, h, first + n, out.g);
            }
            mask(d_M, d_M, d.between);
            for (long i = 0; i < cc; i++) d_G[n * cc + i] += d_M[i];
            for (long i = 0; i < size; i++) d_state[i] *= d.whole;
            product(t.k, t.v, CHUNK, Qn, 1, t.k, d_y, t.v, d_state, t.v, true);
        }
    }

    void finish() {  // gradients of q and k, which all heads of the slice share
        Buffer d_x(ck);
        for (long n = 0; n < count; n++) {
            long at = (t.slice * t.s.tokens + t.token(first + n)) * qk + t.group * t.s.key;
            for (bool of_q : {true, false}) {
                transpose(d_x, (of_q ? d_qT : d_kT) + n * ck, t.k, CHUNK);
                if (of_q) lower(t.k, d_G + n * cc, K + n * ck, t.k, d_x, t.k, true);
                else lower_transposed(t.k, d_G + n * cc, Q + n * ck, t.k, d_x, t.k, true);
                for (int i = 0; i < t.length(first + n); i++)
                    std::memcpy((of_q ? out.q : out.k) + at + i * qk, d_x + i * t.k, 4 * t.s.key);
            }
        }
    }
};

void backward_task(const Task& t, const Inputs& in, const Gradients& out) {
    long size = (long)t.k * t.v;
    Buffer d_states((t.last - t.first) * size);
    for (long h = t.first; h < t.last; h++) read_state(d_states + (h - t.first) * size, in.d_after + t.state(h), t);
    for (long first = (t.chunks() - 1) / SEGMENT * SEGMENT; first >= 0 && t.chunks(); first -= SEGMENT) {
        Segment segment(t, in, out, first);
        for (long h = t.first; h < t.last; h++) segment.head(h, d_states + (h - t.first) * size);
        segment.finish();
    }
    for (long h = t.first; h < t.last; h++) write_state(out.start + t.state(h), d_states + (h - t.first) * size, t);
}

template <class Run>
void share(const Sizes& s, const long* bounds, Run run) {
    std::atomic<long> next{0};
    long tasks = s.rows * s.groups * s.slices;
    auto work = [&] {
        for (long i; (i = next++) < tasks;) run(Task(s, bounds, i));
    };
    std::vector<std::thread> helpers;
    for (long i = 1; i < std::min(s.threads, tasks); i++) helpers.emplace_back(work);
    work();
    for (auto& helper : helpers) helper.join();
}
}  // namespace

extern "C" long stride() { return STRIDE; }

extern "C" void forward(const Sizes* s, const long* bounds, const float* q, const float* k, const float* v,
                        const float* g, const float* start, float* y, float* after, float* marks) {
    share(*s, bounds, [&](const Task& t) { forward_task(t, q, k, v, g, start, y, after, marks); });
}

extern "C" void backward(const Sizes* s, const long* bounds, const float* q, const float* k, const float* v,
                         const float* g, const float* marks, const float* d_y, const float* d_after, float* d_q,
                         float* d_k, float* d_v, float* d_g, float* d_start) {
    Inputs in{q, k, v, g, marks, d_y, d_after};
    Gradients out{d_q, d_k, d_v, d_g, d_start};
    share(*s, bounds, [&](const Task& t) { backward_task(t, in, out); });
}
