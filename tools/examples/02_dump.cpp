// An "engine" of one operation, with a mistake: RMSNorm with epsilon 1e-5 where the model says 1e-6.
// Usage: 02_dump EMBD WEIGHT N_TOKENS N_EMBD FOLDER ID...   (EMBD and WEIGHT are files of float32)
#include <cmath>
#include <cstdlib>
#include <fstream>

#include "refengine_dump.h"

static std::vector<float> read(const char * path, size_t n) {
    std::vector<float> values(n);
    std::ifstream(path, std::ios::binary).read(reinterpret_cast<char *>(values.data()), n * sizeof(float));
    return values;
}

int main(int argc, char ** argv) {
    const size_t n_tokens = std::atoi(argv[3]), n_embd = std::atoi(argv[4]);
    const std::vector<float> embd = read(argv[1], n_tokens * n_embd), weight = read(argv[2], n_embd);
    std::vector<float> attn_norm(embd.size());
    for (size_t t = 0; t < n_tokens; ++t) {
        double squares = 0;
        for (size_t i = 0; i < n_embd; ++i) squares += double(embd[t * n_embd + i]) * embd[t * n_embd + i];
        const float scale = 1.0f / std::sqrt(float(squares / n_embd) + 1e-5f);
        for (size_t i = 0; i < n_embd; ++i) attn_norm[t * n_embd + i] = embd[t * n_embd + i] * scale * weight[i];
    }
    std::vector<int32_t> ids;
    for (int i = 6; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
    refengine::Dump dump(argv[5], "one operation", ids);
    dump.add("embd", -1, embd.data(), {int64_t(n_tokens), int64_t(n_embd)});
    dump.add("attn_norm", 0, attn_norm.data(), {int64_t(n_tokens), int64_t(n_embd)});
    dump.finish();
}
