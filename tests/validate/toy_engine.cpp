// A toy Llama in plain C++ that dumps what it computes: `toy_engine WEIGHTS FOLDER [broken]`.
//
// WEIGHTS: 8 int32 (n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_tokens), the ids as int32, then all
// matrices as float32, (n_out, n_in), in the order in which they are read below.
#include <cmath>
#include <fstream>

#include "refengine_dump.h"

using Vec = std::vector<float>;

static std::ifstream in;

static Vec read(size_t n) {
    Vec v(n);
    in.read(reinterpret_cast<char *>(v.data()), n * sizeof(float));
    return v;
}

static Vec rms_norm(const Vec & x, const Vec & w, int n) {
    Vec y(x.size());
    for (size_t t = 0; t < x.size() / n; ++t) {
        float sum = 0;
        for (int i = 0; i < n; ++i) sum += x[t * n + i] * x[t * n + i];
        const float scale = 1.0f / std::sqrt(sum / n + 1e-5f);
        for (int i = 0; i < n; ++i) y[t * n + i] = x[t * n + i] * scale * w[i];
    }
    return y;
}

static Vec matmul(const Vec & x, const Vec & w, int n_in) {
    const size_t n_out = w.size() / n_in, n = x.size() / n_in;
    Vec y(n * n_out);
    for (size_t t = 0; t < n; ++t)
        for (size_t o = 0; o < n_out; ++o) {
            float sum = 0;
            for (int i = 0; i < n_in; ++i) sum += x[t * n_in + i] * w[o * n_in + i];
            y[t * n_out + o] = sum;
        }
    return y;
}

static void rope(Vec & x, int n_heads, int head_dim, int late) {  // neighbours (2i, 2i + 1)
    for (size_t r = 0; r < x.size() / head_dim; ++r)
        for (int i = 0; i < head_dim; i += 2) {
            const int position = static_cast<int>(r) / n_heads;
            const float angle = (position + (position > 3 ? late : 0)) * std::pow(10000.0f, -float(i) / head_dim);
            const float c = std::cos(angle), s = std::sin(angle), a = x[r * head_dim + i], b = x[r * head_dim + i + 1];
            x[r * head_dim + i] = a * c - b * s;
            x[r * head_dim + i + 1] = a * s + b * c;
        }
}

static Vec sum(const Vec & a, const Vec & b) {
    Vec y(a);
    for (size_t i = 0; i < y.size(); ++i) y[i] += b[i];
    return y;
}

int main(int argc, char ** argv) {
    in.open(argv[1], std::ios::binary);
    int32_t c[8];
    in.read(reinterpret_cast<char *>(c), sizeof c);
    const int n_layer = c[0], E = c[1], H = c[2], KV = c[3], D = c[4], F = c[5], V = c[6], N = c[7];
    std::vector<int32_t> ids(N);
    in.read(reinterpret_cast<char *>(ids.data()), N * sizeof(int32_t));
    refengine::Dump dump(argv[2], "toy engine", ids, "", "float32");
    const Vec embeddings = read(size_t(V) * E);
    Vec x;
    for (int32_t id : ids) x.insert(x.end(), embeddings.begin() + id * E, embeddings.begin() + (id + 1) * E);
    dump.add("embd", -1, x.data(), {N, E});
    for (int il = 0; il < n_layer; ++il) {
        const Vec norm = rms_norm(x, read(E), E);
        dump.add("attn_norm", il, norm.data(), {N, E});
        Vec q = matmul(norm, read(size_t(H) * D * E), E), k = matmul(norm, read(size_t(KV) * D * E), E);
        const Vec v = matmul(norm, read(size_t(KV) * D * E), E);
        rope(q, H, D, 0);
        rope(k, KV, D, argc > 3 && il == 1 ? 1 : 0);  // the planted fault: from position 4 on, keys are one too far
        dump.add("Qcur", il, q.data(), {N, H, D});
        dump.add("Kcur", il, k.data(), {N, KV, D});
        dump.add("Vcur", il, v.data(), {N, KV * D});
        Vec heads(size_t(N) * H * D);
        for (int t = 0; t < N; ++t)
            for (int h = 0; h < H; ++h) {
                const int g = h / (H / KV);
                Vec p(t + 1);
                float top = -INFINITY, total = 0;
                for (int j = 0; j <= t; ++j) {
                    for (int d = 0; d < D; ++d) p[j] += q[(t * H + h) * D + d] * k[(j * KV + g) * D + d];
                    top = std::max(top, p[j] /= std::sqrt(float(D)));
                }
                for (float & e : p) total += e = std::exp(e - top);
                for (int j = 0; j <= t; ++j)
                    for (int d = 0; d < D; ++d) heads[(t * H + h) * D + d] += p[j] / total * v[(j * KV + g) * D + d];
            }
        dump.add("kqv_out", il, heads.data(), {N, H * D});
        x = sum(x, matmul(heads, read(size_t(E) * H * D), H * D));
        dump.add("ffn_inp", il, x.data(), {N, E});
        const Vec ffn_norm = rms_norm(x, read(E), E);
        dump.add("ffn_norm", il, ffn_norm.data(), {N, E});
        Vec gate = matmul(ffn_norm, read(size_t(F) * E), E);
        const Vec up = matmul(ffn_norm, read(size_t(F) * E), E);
        for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
        dump.add("ffn_swiglu", il, gate.data(), {N, F});
        x = sum(x, matmul(gate, read(size_t(E) * F), F));
        dump.add("l_out", il, x.data(), {N, E});
    }
    const Vec norm = rms_norm(x, read(E), E);
    dump.add("result_norm", -1, norm.data(), {N, E});
    const Vec logits = matmul(norm, read(size_t(V) * E), E);
    dump.add("result_output", -1, logits.data(), {N, V});
    if (!in) throw std::runtime_error("the weights are too short");
    dump.finish();
}
