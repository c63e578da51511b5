// A new report opens at a size at which its picture can be read. A saved workflow brings a size of its own.
import { app } from "../../scripts/app.js"

const REPORTS = ["SpargeAttnReport", "SpargeAttnBenchmark"]

app.registerExtension({
  name: "SpargeAttn.report",
  nodeCreated(node) {
    if (REPORTS.includes(node.comfyClass)) node.setSize([600, 1000])
  }
})
