// Writes intermediate tensors of your engine as a dump that `refengine` reads (refengine/validate/dump.py).
//
// One header, C++11, nothing but the standard library: paste it into your engine.
//
//     refengine::Dump dump("my_dump", "my engine 1.0", {1, 15043, 3186});           // folder, engine, token ids
//     dump.add("Qcur", 0, q, {n_tokens, n_head, head_dim});                         // after RoPE, layer 0
//     dump.add("Qcur", 0, q_product, {n_tokens, n_head * head_dim}, 0);             // occurrence 0: the bare product
//     dump.add("result_output", -1, logits, {n_tokens, n_vocab});                   // of no layer
//     dump.finish();                                                                // says that nothing is missing
//
// Shapes are in NumPy order: slowest axis first, rows are tokens. Values are float (f32); `add_raw` takes other types.
// With CUDA, `add_device` copies from device memory first (include <cuda_runtime.h> before this header).
// The manifest is written anew after every tensor, so that a crash loses nothing that was added; it says
// "complete": false until `finish`. Errors throw std::runtime_error.

#ifndef REFENGINE_DUMP_H
#define REFENGINE_DUMP_H

#include <sys/stat.h>
#ifdef _WIN32
#include <direct.h>
#endif

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace refengine {

class Dump {
public:
    // model_sha256: of the GGUF file, in hexadecimal, if you have it. The folder is made; an older dump in it is replaced.
    Dump(const std::string & folder, const std::string & engine, const std::vector<int32_t> & ids,
         const std::string & model_sha256 = "", const std::string & numerics = "")
        : folder_(folder), offset_(0) {
#ifdef _WIN32
        _mkdir(folder.c_str());
#else
        mkdir(folder.c_str(), 0777);
#endif
        head_ = "{\n \"format\": \"refengine-dump\",\n \"format_version\": 1,\n \"engine\": " + quoted(engine) +
                ",\n \"model_sha256\": " + (model_sha256.empty() ? std::string("null") : quoted(model_sha256)) +
                ",\n \"numerics\": " + quoted(numerics) + ",\n \"axis_order\": \"numpy\",\n \"ids\": [";
        for (size_t i = 0; i < ids.size(); ++i) {
            head_ += (i ? ", " : "") + std::to_string(ids[i]);
        }
        head_ += "]";
        data_ = std::fopen(path("tensors.bin").c_str(), "wb");
        if (!data_) {
            throw std::runtime_error("refengine dump: cannot write " + path("tensors.bin"));
        }
        write_manifest(false);
    }

    ~Dump() {
        if (data_) {
            std::fclose(data_);
        }
    }

    Dump(const Dump &) = delete;
    Dump & operator=(const Dump &) = delete;

    // layer -1: of no layer. occurrence -1: the last tensor of this name (for Qcur and Kcur: after RoPE).
    void add(const std::string & name, int layer, const float * values, const std::vector<int64_t> & shape,
             int occurrence = -1) {
        add_raw(name, layer, values, shape, "f32", sizeof(float), occurrence);
    }

    // dtype: f32, f16, bf16, f64, i32 or i64, little-endian, without gaps between the elements.
    void add_raw(const std::string & name, int layer, const void * values, const std::vector<int64_t> & shape,
                 const std::string & dtype, size_t element_size, int occurrence = -1) {
        size_t n_bytes = element_size;
        std::string lengths;
        for (size_t i = 0; i < shape.size(); ++i) {
            n_bytes *= static_cast<size_t>(shape[i]);
            lengths += (i ? ", " : "") + std::to_string(shape[i]);
        }
        if (std::fwrite(values, 1, n_bytes, data_) != n_bytes || std::fflush(data_) != 0) {
            throw std::runtime_error("refengine dump: cannot write to " + path("tensors.bin"));
        }
        tensors_ += std::string(tensors_.empty() ? "" : ",") + "\n  {\"name\": " + quoted(name) +
                    ", \"layer\": " + (layer < 0 ? std::string("null") : std::to_string(layer)) +
                    ", \"occurrence\": " + (occurrence < 0 ? std::string("null") : std::to_string(occurrence)) +
                    ", \"shape\": [" + lengths + "], \"dtype\": \"" + dtype +
                    "\", \"file\": \"tensors.bin\", \"offset\": " + std::to_string(offset_) + "}";
        offset_ += n_bytes;
        write_manifest(false);
    }

#ifdef CUDART_VERSION
    // As `add`, of float values in device memory. Waits for the work on the device.
    void add_device(const std::string & name, int layer, const float * values, const std::vector<int64_t> & shape,
                    int occurrence = -1) {
        size_t n = 1;
        for (int64_t length : shape) {
            n *= static_cast<size_t>(length);
        }
        std::vector<float> host(n);
        cudaError_t status = cudaDeviceSynchronize();
        if (status == cudaSuccess) {
            status = cudaMemcpy(host.data(), values, n * sizeof(float), cudaMemcpyDeviceToHost);
        }
        if (status != cudaSuccess) {
            throw std::runtime_error("refengine dump: " + name + ": " + cudaGetErrorString(status));
        }
        add(name, layer, host.data(), shape, occurrence);
    }
#endif

    void finish() { write_manifest(true); }

private:
    std::string path(const std::string & file) const { return folder_ + "/" + file; }

    void write_manifest(bool complete) {
        const std::string temporary = path("manifest.json.tmp");
        std::FILE * file = std::fopen(temporary.c_str(), "wb");
        const std::string text = head_ + ",\n \"complete\": " + (complete ? "true" : "false") + ",\n \"tensors\": [" +
                                 tensors_ + "\n ]\n}\n";
        const bool written = file && std::fwrite(text.data(), 1, text.size(), file) == text.size();
        if (!file || std::fclose(file) != 0 || !written) {
            throw std::runtime_error("refengine dump: cannot write " + temporary);
        }
#ifdef _WIN32
        std::remove(path("manifest.json").c_str());  // rename does not replace there
#endif
        if (std::rename(temporary.c_str(), path("manifest.json").c_str()) != 0) {
            throw std::runtime_error("refengine dump: cannot write " + path("manifest.json"));
        }
    }

    static std::string quoted(const std::string & text) {
        std::string out = "\"";
        for (unsigned char c : text) {
            if (c == '"' || c == '\\') {
                out += '\\';
                out += static_cast<char>(c);
            } else if (c < 0x20) {
                char escaped[8];
                std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
                out += escaped;
            } else {
                out += static_cast<char>(c);
            }
        }
        return out + "\"";
    }

    std::string folder_, head_, tensors_;
    std::FILE * data_ = nullptr;
    uint64_t offset_;
};

}  // namespace refengine

#endif
